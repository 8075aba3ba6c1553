"""Certificates of mutual TLS: a set for tests is made here, and one's own is checked before anybody is asked."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from parameter_server.security.tls_config import TlsConfig

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

AUTHORITY, SERVER, CLIENT = "authority", "server", "client"
PUBLIC, PRIVATE = 0o644, 0o600


@dataclass(frozen=True)
class Own:
    """Contents of the three files, in PEM, checked."""

    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes


def read_own(tls: TlsConfig, now: datetime.datetime | None = None) -> Own:
    """Reads this process's certificate, its key and the authority's certificate, and checks that they can be used.

    Raises:
        ValueError: One cannot be read, is expired or not valid yet, or they do not belong together.
        OSError: A file is missing.
    """
    x509 = _import_x509()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if tls.certificate is None or tls.key is None or tls.authority is None:
        raise ValueError("--tls: expected --tls.certificate, --tls.key and --tls.authority, got none")
    own = Own(tls.certificate.read_bytes(), tls.key.read_bytes(), tls.authority.read_bytes())
    certificate = _read_certificates(own.certificate, f"--tls.certificate {tls.certificate}", now)[0]
    try:
        key = load_pem_private_key(own.key, password=None)
    except (ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise ValueError(
            f"--tls.key {tls.key}: expected a private key in PEM without a password, got {error}"
        ) from error
    if key.public_key() != certificate.public_key():
        raise ValueError(f"--tls.key {tls.key}: expected the key of {tls.certificate}, got another one")
    authorities = _read_certificates(own.authority, f"--tls.authority {tls.authority}", now)
    issuers = {authority.subject for authority in authorities}
    chain = x509.load_pem_x509_certificates(own.certificate)
    if not any(link.issuer in issuers for link in chain):
        raise ValueError(
            f"--tls.certificate {tls.certificate}: expected one that {tls.authority} has issued, got one of "
            f"{chain[-1].issuer.rfc4514_string()}"
        )
    return own


def make_set(folder: Path, hosts: Sequence[str], *, days: float = 30.0) -> list[Path]:
    """Makes an authority, and a server's and a client's certificate of it, for tests; gives the files' paths.

    Args:
        folder: New files go there: authority, server and client, each as ``.pem`` and ``.key``.
        hosts: Names and numbers that the server is asked for by; localhost is always among them.
        days: That they are valid.

    Raises:
        ValueError: One of the files exists.
    """
    files = {name: (folder / f"{name}.pem", folder / f"{name}.key") for name in (AUTHORITY, SERVER, CLIENT)}
    for file in (file for pair in files.values() for file in pair):
        if os.path.lexists(file):
            raise ValueError(f"{file}: expected no file there, as certificates are never overwritten, got one")
    folder.mkdir(parents=True, exist_ok=True)
    issuer = make_certificate("recforge test authority", days=days)
    named = dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"])
    made = {
        AUTHORITY: issuer,
        SERVER: make_certificate("recforge server", issuer, hosts=list(named), days=days),
        CLIENT: make_certificate("recforge client", issuer, days=days),
    }
    for name, issued in made.items():
        write_pair(issued, *files[name])
    return [file for pair in files.values() for file in pair]


Issued = tuple["x509.Certificate", "EllipticCurvePrivateKey"]


def make_certificate(
    name: str, issuer: Issued | None = None, *, hosts: Sequence[str] = (), days: float = 30.0, start_days: float = 0.0
) -> Issued:
    """Makes a certificate and its key: ECDSA on P-256.

    Args:
        name: Of whom it is.
        issuer: Who signs; None makes an authority, which signs itself.
        hosts: Names and numbers; with some, it is a server's, which is a client of other servers too.
        days: From its start on that it is valid.
        start_days: From now on; below 0 is the past.
    """
    x509 = _import_x509()
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    # Clocks of machines differ a little.
    start = _now() + datetime.timedelta(days=start_days, minutes=-5)
    signer = issuer[0].subject if issuer else subject
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=signer, public_key=key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(start).not_valid_after(start + datetime.timedelta(days=days))
    builder = builder.add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    if issuer is None:
        builder = builder.add_extension(_signs_others(), critical=True)
    else:
        by = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer[1].public_key())
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if hosts else [])]
        builder = builder.add_extension(by, critical=False).add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    if hosts:
        names = x509.SubjectAlternativeName([_host_name(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(issuer[1] if issuer else key, hashes.SHA256()), key


def write_pair(issued: Issued, certificate: Path, key: Path) -> None:
    """Writes a certificate and its key to new files; nobody else may read the key.

    Raises:
        FileExistsError: One is there.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    _write_new(certificate, issued[0].public_bytes(Encoding.PEM), PUBLIC)
    _write_new(key, issued[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), PRIVATE)


def _write_new(file: Path, content: bytes, mode: int) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
        opened.write(content)


def _read_certificates(content: bytes, place: str, now: datetime.datetime | None) -> list[x509.Certificate]:
    """Reads certificates, and checks that the first one is valid now."""
    from cryptography.x509 import load_pem_x509_certificates

    try:
        certificates = load_pem_x509_certificates(content)
    except ValueError as error:
        raise ValueError(f"{place}: expected a certificate in PEM, got {error}") from error
    first, now = certificates[0], now or _now()
    if now > first.not_valid_after_utc:
        raise ValueError(f"{place}: expected a valid certificate, got one that expired on {first.not_valid_after_utc}")
    if now < first.not_valid_before_utc:
        raise ValueError(
            f"{place}: expected a valid certificate, got one that is not valid before {first.not_valid_before_utc}"
        )
    return certificates


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _import_x509() -> ModuleType:
    try:
        from cryptography import x509
    except ModuleNotFoundError:
        raise ValueError("cryptography is not installed; run: pip install 'recforge[ps]'") from None
    return x509


def _host_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _signs_others() -> x509.KeyUsage:
    from cryptography import x509

    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
    unused = dict.fromkeys((*others, "decipher_only"), False)
    return x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, **unused)
