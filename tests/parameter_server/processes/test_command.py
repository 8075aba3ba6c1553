"""Questions from the command line are answered by a run's coordinator; wrong flags are one line that names them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dlrm.asynchronous.command import run_ps
from dlrm.cli import main
from embeddings.tables import TableConfig
from parameter_server.control.coordinator_service import SERVICE, CoordinatorService
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.description import RunDescription
from parameter_server.processes.command import DrainConfig, SnapshotConfig, StatusConfig
from parameter_server.processes.config import CoordinatorConfig, ShardConfig
from parameter_server.processes.endpoint import Endpoint
from parameter_server.security.security import ServerSecurity

RUN = RunDescription(
    run_id=7, seed=1, tables=(TableConfig(name="site", num_rows=9, dim=4),), samples=100, epoch_samples=100
)


@pytest.fixture
def coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    """A run with one shard, at `unix:c`."""
    monkeypatch.chdir(tmp_path)
    endpoint = Endpoint(ServerSecurity())
    with closing(Coordinator(RUN)) as run:
        run.register("shard", "shard-0", "localhost:1")
        CoordinatorService(run).add_to(endpoint.server)
        endpoint.listen("unix:c")
        endpoint.start([SERVICE])
        try:
            yield run
        finally:
            endpoint.stop(0.0)


@pytest.mark.usefixtures("coordinator")
def test_status_is_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_ps(["status", "--coordinator", "unix:c"]) == 0
    told = capsys.readouterr().out
    assert "0 of 100 samples (0.0%)" in told
    assert "shard shard-0 (member 1): heard of" in told
    assert "4096 buckets" in told
    assert run_ps(["status", "--coordinator", "unix:c", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 100


@pytest.mark.usefixtures("coordinator")
def test_what_cannot_be_done_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in {
        ("snapshot", "--coordinator", "unix:c"): "snapshot",
        ("drain", "--coordinator", "unix:c", "--shard", "9"): "9",
        ("status", "--coordinator", "unix:none", "--deadline-seconds", "0.1"): "no such socket",
        ("drain", "--coordinator", "unix:c"): "--shard",
        ("certificates",): "PATH",
        ("no-such-part",): "expected one of up, coordinator, shard",
    }.items():
        assert main(["ps", *argv]) in (1, 2)
        line = capsys.readouterr().err
        assert line.startswith("recforge: error: ")
        assert line.count("\n") == 1
        assert words in line


def test_certificates_are_made_and_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "certificates", str(tmp_path / "tls"), "--host", "a.example", "10.0.0.7"]) == 0
    assert f"--tls.authority {tmp_path}/tls/authority.pem" in capsys.readouterr().out
    from cryptography import x509

    made = x509.load_pem_x509_certificate((tmp_path / "tls" / "server.pem").read_bytes())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"a.example", "localhost"}
    assert {str(address) for address in names.get_values_for_type(x509.IPAddress)} == {"10.0.0.7", "127.0.0.1", "::1"}
    assert (made.not_valid_after_utc - made.not_valid_before_utc).days == 30
    assert main(["ps", "certificates", str(tmp_path / "tls")]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"address": "nowhere"}, r"--address: expected HOST:PORT or unix:/PATH, got 'nowhere'"),
        ({"address": "localhost:70000"}, r"--address: expected HOST:PORT"),
        ({"address": "unix:" + "long/" * 30}, r"--address: expected a path of 1 to 107 bytes"),
        ({"address": "0.0.0.0:7000"}, r"--advertise: expected the address that others use"),
        ({"advertise": "me"}, r"--advertise: expected HOST:PORT"),
        ({"metrics_port": -1}, r"--metrics-port: expected 0 to 65535, got -1"),
        ({"eviction_seconds": 0.0}, r"--eviction-seconds: expected a number above 0, got 0.0"),
        ({"coordinator": ""}, r"--coordinator: expected HOST:PORT"),
    ],
)
def test_settings_that_make_no_sense_name_their_flag(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardConfig(**{"coordinator": "localhost:1", **settings})  # type: ignore[arg-type]


def test_what_others_are_told_has_the_port_that_was_taken(tmp_path: Path) -> None:
    config = CoordinatorConfig(folder=tmp_path, address="0.0.0.0:0", advertise="here.example:0")
    assert config.tell("0.0.0.0:4711") == "here.example:4711"
    assert CoordinatorConfig(folder=tmp_path).tell("localhost:9") == "localhost:9"


def test_shards_have_the_names_of_their_folders() -> None:
    assert ShardConfig(coordinator="localhost:1", folder=Path("run/shard-7")).called == "shard-7"
    assert ShardConfig(coordinator="localhost:1", name="me", folder=Path("run/shard-7")).called == "me"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--folder", "/proc/none"), "--folder /proc/none: expected a folder, or room to make one, got none"),
        (("--folder", "here", "--token-file", "none"), "--token-file none: expected a file that can be read, got none"),
        (("--nope", "1"), "--nope 1. For full helptext"),
    ],
)
def test_what_is_not_there_is_told_by_its_flag(
    flags: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ps", "coordinator", *flags]) == 2
    assert words in capsys.readouterr().err


def test_questions_to_nobody_are_given_up_soon() -> None:
    for question in (
        StatusConfig(coordinator="localhost:1"),
        SnapshotConfig(coordinator="localhost:1"),
        DrainConfig(coordinator="localhost:1", shard=0),
    ):
        assert question.deadline_seconds == 5.0
