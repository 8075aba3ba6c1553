"""Says why a server does not answer: gRPC knows little more than that it does not."""

from __future__ import annotations

import socket
import ssl

from parameter_server.address import Address, connect
from parameter_server.security.security import ClientSecurity

FLAGS = "--tls.certificate, --tls.key and --tls.authority"
# What a client of HTTP/2 says first: a preface, and settings without any.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_TLS_RECORDS = (0x15, 0x16)  # alert, handshake

# Alerts of TLS, in parts of OpenSSL's names, by which a server says what is wrong with the client's certificate.
_ALERTS = {
    "CERTIFICATE_REQUIRED": "it asks for a certificate, and got none",
    "HANDSHAKE_FAILURE": "it asks for a certificate, and got none",
    "CERTIFICATE_EXPIRED": "it takes --tls.certificate for expired",
    "UNKNOWN_CA": "it does not know the authority of --tls.certificate",
    "BAD_CERTIFICATE": "it does not accept --tls.certificate",
    "CERTIFICATE_UNKNOWN": "it does not accept --tls.certificate",
    "UNSUPPORTED_CERTIFICATE": "--tls.certificate is not one for clients",
}


def why_unreachable(address: str, security: ClientSecurity, timeout_seconds: float = 5.0) -> str:
    """Tries to reach a server step by step, and gives one line on the first that fails.

    Args:
        address: Of the server.
        security: As of the channel that failed.
        timeout_seconds: For each step.
    """
    place = Address.parse(address)
    try:
        with connect(place, timeout_seconds) as opened:
            reason = _try_tls(opened, place, security) if security.uses_tls(place) else _try_plain(opened)
    except FileNotFoundError:
        reason = "there is no such socket; has its server been started?"
    except ConnectionRefusedError:
        reason = "nobody listens there"
    except socket.gaierror:
        reason = f"the name {place.host} leads nowhere"
    except TimeoutError:
        reason = f"no answer within {timeout_seconds:g} s"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    return f"{address}: cannot be reached: {reason}"


def _try_plain(opened: socket.socket) -> str:
    opened.sendall(_GREETING)
    first = opened.recv(1)
    if first and first[0] in _TLS_RECORDS:
        return f"it speaks TLS; give {FLAGS}"
    if not first:
        return f"it hangs up on plain text; give {FLAGS} if it speaks TLS"
    return "it listens, but has not answered in time"


def _try_tls(opened: socket.socket, place: Address, security: ClientSecurity) -> str:
    context = ssl.create_default_context(cafile=security.tls.authority)
    context.load_cert_chain(str(security.tls.certificate), security.tls.key)
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(opened, server_hostname=place.host) as wrapped:
            wrapped.sendall(_GREETING)
            # A server of TLS 1.3 judges the client's certificate after its own part of the handshake.
            if not wrapped.recv(1):
                return "it does not accept --tls.certificate: expired there, or of an authority it does not know"
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is refused: {_judge(error, place)}"
    except ssl.SSLError as error:
        name = error.reason or str(error)
        if "WRONG_VERSION_NUMBER" in name or "RECORD_LAYER" in name:
            return f"it does not speak TLS; start it with {FLAGS}, or leave them out here"
        told = next((line for alert, line in _ALERTS.items() if name.endswith(alert)), "")
        return told or f"no TLS with it: {name.lower().replace('_', ' ')}"
    return "it listens, but has not answered in time"


def _judge(error: ssl.SSLCertVerificationError, place: Address) -> str:
    if error.verify_code in (_HOST, _NUMBER):
        return f"it is not for {place.host}; make it with --host {place.host}, or ask for a host that it names"
    if error.verify_code in _UNKNOWN:
        return "it is not of the authority in --tls.authority"
    return error.verify_message


_HOST, _NUMBER = 62, 64  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
_UNKNOWN = (7, 18, 19, 20, 21)  # X509_V_ERR_...: a signature that does not fit, or nobody who is known
