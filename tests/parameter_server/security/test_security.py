"""Strangers stay outside: real certificates and tokens over loopback, and each refusal says its reason."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from parameter_server.processes.endpoint import Endpoint
from parameter_server.security.certificates import Issued, make_certificate, make_set, read_own, write_pair
from parameter_server.security.security import ClientSecurity, ServerSecurity, read_token
from parameter_server.security.tls_config import TlsConfig
from parameter_server.security.unreachable import why_unreachable

TOKEN = "0123456789abcdef0123"
Files = Callable[..., TlsConfig]


@pytest.fixture
def authority() -> Issued:
    return make_certificate("the authority")


@pytest.fixture
def files(tmp_path: Path, authority: Issued) -> Files:
    """Makes a certificate of the authority, or of another `issuer`, that knows the authority."""
    write_pair(authority, tmp_path / "authority.pem", tmp_path / "authority.key")

    def make(name: str, issuer: Issued | None = None, **kinds: object) -> TlsConfig:
        issued = make_certificate(name, issuer or authority, **{"hosts": ["localhost"], **kinds})  # type: ignore[arg-type]
        write_pair(issued, tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
        return TlsConfig(
            certificate=tmp_path / f"{name}.pem", key=tmp_path / f"{name}.key", authority=tmp_path / "authority.pem"
        )

    return make


@contextmanager
def served(security: ServerSecurity, address: str = "localhost:0") -> Iterator[str]:
    """A server with one method, `/test/Echo`."""
    endpoint = Endpoint(security)
    echo = grpc.unary_unary_rpc_method_handler(lambda request, _: request)
    endpoint.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Echo": echo}),))
    try:
        at = endpoint.listen(address)
        endpoint.start()
        yield at
    finally:
        endpoint.stop(0.0)


def call(address: str, security: ClientSecurity) -> bytes:
    with security.open_channel(address) as channel:
        answer: bytes = channel.unary_unary("/test/Echo")(b"hello", timeout=5)
    return answer


def refusal_of(address: str, security: ClientSecurity) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        call(address, security)
    return refused.value.code(), refused.value.details()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that does not look at its own certificate first, so that the other side has to refuse it."""
    from parameter_server.security import certificates

    monkeypatch.setattr(
        certificates,
        "_read_certificates",
        lambda content, *_: certificates._import_x509().load_pem_x509_certificates(content),
    )


def test_certificates_of_one_authority_and_the_token_are_let_in(files: Files) -> None:
    with served(ServerSecurity(tls=files("server"), token=TOKEN)) as address:
        assert call(address, ClientSecurity(tls=files("client", hosts=()), token=TOKEN)) == b"hello"


def test_the_set_made_for_tests_works_for_both_sides(tmp_path: Path) -> None:
    paths = make_set(tmp_path / "set", ["example.test", "10.0.0.1"])
    own = {
        name: TlsConfig(
            certificate=tmp_path / "set" / f"{name}.pem",
            key=tmp_path / "set" / f"{name}.key",
            authority=tmp_path / "set/authority.pem",
        )
        for name in ("server", "client")
    }
    with served(ServerSecurity(tls=own["server"])) as address:
        assert call(address, ClientSecurity(tls=own["client"])) == b"hello"
        assert call(address, ClientSecurity(tls=own["server"])) == b"hello"  # a shard asks the coordinator
    assert len(paths) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.suffix == ".key"} == {0o600}
    before = [path.read_bytes() for path in paths]
    with pytest.raises(ValueError, match=r"authority\.pem: expected no file there"):
        make_set(tmp_path / "set", [])
    assert [path.read_bytes() for path in paths] == before


def test_without_a_certificate_nobody_gets_in(files: Files) -> None:
    with served(ServerSecurity(tls=files("server"))) as address:
        own = read_own(files("client"))
        with (
            grpc.secure_channel(address, grpc.ssl_channel_credentials(own.authority)) as channel,
            pytest.raises(grpc.RpcError) as refused,
        ):
            channel.unary_unary("/test/Echo")(b"", timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert refusal_of(address, ClientSecurity())[0] is grpc.StatusCode.UNAVAILABLE
        assert "give --tls.certificate" in why_unreachable(address, ClientSecurity())


@pytest.mark.usefixtures("unchecked")
def test_a_client_of_another_authority_or_expired_is_refused(files: Files) -> None:
    other = make_certificate("the authority")  # of the same name
    with served(ServerSecurity(tls=files("server"))) as address:
        for stranger in (files("stranger", other), files("old", start_days=-9, days=2), files("early", start_days=3)):
            security = ClientSecurity(tls=stranger)
            assert refusal_of(address, security)[0] is grpc.StatusCode.UNAVAILABLE
            assert "does not accept --tls.certificate" in why_unreachable(address, security)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        ({"issuer": None, "start_days": -9.0, "days": 2.0}, "certificate has expired"),
        ({"issuer": None, "start_days": 3.0}, "certificate is not yet valid"),
        ({"issuer": None, "hosts": ["elsewhere.test"]}, "not for localhost; make it with --host localhost"),
        ({"issuer": "other"}, "not of the authority in --tls.authority"),
    ],
)
def test_a_server_that_cannot_be_trusted_is_refused_with_the_reason(
    files: Files, kinds: dict[str, object], reason: str
) -> None:
    issuer = make_certificate("the authority") if kinds["issuer"] else None
    bad = files("bad", **{**kinds, "issuer": issuer})
    with served(ServerSecurity(tls=bad)) as address:
        security = ClientSecurity(tls=files("client"))
        assert refusal_of(address, security)[0] is grpc.StatusCode.UNAVAILABLE
        assert reason in why_unreachable(address, security)


def test_ones_own_certificate_is_checked_at_the_start(files: Files, tmp_path: Path) -> None:
    good, old, early = files("good"), files("old", start_days=-9, days=2), files("early", start_days=3)
    stranger = files("stranger", make_certificate("another authority"))
    (tmp_path / "empty.pem").write_text("")
    wrong = {
        r"--tls.certificate .*old.pem: .* expired on": old,
        r"--tls.certificate .*early.pem: .* not valid before": early,
        r"--tls.key .*old.key: expected the key of .*good.pem": TlsConfig(
            certificate=good.certificate, key=old.key, authority=good.authority
        ),
        r"--tls.certificate .*stranger.pem: expected one that .*authority.pem has issued": stranger,
        r"--tls.certificate .*empty.pem: expected a certificate in PEM": TlsConfig(
            certificate=tmp_path / "empty.pem", key=good.key, authority=good.authority
        ),
        r"--tls.key .*authority.pem: expected a private key": TlsConfig(
            certificate=good.certificate, key=good.authority, authority=good.authority
        ),
    }
    for message, tls in wrong.items():
        with pytest.raises(ValueError, match=message):
            Endpoint(ServerSecurity(tls=tls)).listen("localhost:0")
        with pytest.raises(ValueError, match=message):
            ClientSecurity(tls=tls).open_channel("localhost:1")
    with pytest.raises(
        ValueError, match=r"expected --tls.certificate, --tls.key and --tls.authority, got --tls.key alone"
    ):
        TlsConfig(key=good.key)


def test_calls_need_the_token_but_health_does_not() -> None:
    with served(ServerSecurity(token=TOKEN)) as address:
        code, details = refusal_of(address, ClientSecurity())
        assert (code, "got none" in details) == (grpc.StatusCode.UNAUTHENTICATED, True)
        code, details = refusal_of(address, ClientSecurity(token=TOKEN + "4"))
        assert (code, "got another" in details, TOKEN in details) == (grpc.StatusCode.UNAUTHENTICATED, True, False)
        assert call(address, ClientSecurity(token=TOKEN)) == b"hello"
        with ClientSecurity().open_channel(address) as channel:
            assert HealthStub(channel).Check(HealthCheckRequest(), timeout=5)
    assert TOKEN not in repr(ServerSecurity(token=TOKEN)) + repr(ClientSecurity(token=TOKEN))


def test_streams_need_the_token_too() -> None:
    with served(ServerSecurity(token=TOKEN)) as address, ClientSecurity().open_channel(address) as channel:
        for calling in (channel.stream_stream, channel.unary_stream, channel.stream_unary):
            argument = b"" if calling == channel.unary_stream else iter([b""])
            method = calling("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
            with pytest.raises(grpc.RpcError) as refused:
                list(method(argument, timeout=5))
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "10.1.2.3:7000", "shard-0.example:7000"])
@pytest.mark.parametrize("token", ["", TOKEN])
def test_plain_text_stays_on_this_machine(address: str, token: str) -> None:
    with pytest.raises(ValueError, match=r"give --tls.certificate, --tls.key and --tls.authority"):
        Endpoint(ServerSecurity(token=token)).listen(address)
    with pytest.raises(ValueError, match=r"give --tls.certificate, --tls.key and --tls.authority"):
        ClientSecurity(token=token).open_channel(address)


def test_tls_alone_is_not_enough_off_this_machine(files: Files) -> None:
    with pytest.raises(ValueError, match=r"give --token-file \(or RECFORGE_TOKEN\), or use"):
        Endpoint(ServerSecurity(tls=files("server"))).listen("0.0.0.0:0")
    with served(ServerSecurity(tls=files("other"), token=TOKEN), "0.0.0.0:0") as address:
        near = address.replace("0.0.0.0", "localhost")
        assert call(near, ClientSecurity(tls=files("client"), token=TOKEN)) == b"hello"


def test_an_address_in_use_is_not_shared_nor_stolen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for asked in ("localhost:0", "unix:socket"):
        with served(ServerSecurity(), asked) as address:
            with pytest.raises(OSError, match=r"in use.*; choose another --address"):
                Endpoint(ServerSecurity()).listen(address)
            assert call(address, ClientSecurity()) == b"hello"


def test_a_unix_socket_is_its_owners_alone_and_a_dead_ones_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind("socket")
    with served(ServerSecurity(), "unix:socket") as address:
        assert stat.S_IMODE(Path("socket").stat().st_mode) == 0o600
        assert call(address, ClientSecurity()) == b"hello"
    Path("file").write_text("precious")
    with pytest.raises(OSError, match="expected a socket or nothing there"):
        Endpoint(ServerSecurity()).listen("unix:file")
    assert Path("file").read_text() == "precious"


def test_nobody_listening_is_told_apart_from_tls_that_does_not_fit(files: Files) -> None:
    with served(ServerSecurity()) as address:
        assert "does not speak TLS" in why_unreachable(address, ClientSecurity(tls=files("client")))
    assert "nobody listens there" in why_unreachable(address, ClientSecurity())
    assert "no such socket" in why_unreachable("unix:none", ClientSecurity())


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECFORGE_TOKEN", raising=False)
    assert read_token(None) == ""
    monkeypatch.setenv("RECFORGE_TOKEN", TOKEN)
    assert read_token(None) == TOKEN
    file = tmp_path / "token"
    file.write_text(TOKEN[::-1] + "\n")
    assert read_token(file) == TOKEN[::-1]
    for bad in ("", "short-secret", "with a blank in between", "nötiger-als-nötig-lang"):
        file.write_text(bad, encoding="utf-8")
        with pytest.raises(ValueError, match=r"--token-file .*: expected at least 16") as refused:
            read_token(file)
        assert not bad or bad not in str(refused.value)
