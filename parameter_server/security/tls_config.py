"""Which files TLS is made of; free of gRPC, so that the command line stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """Files of mutual TLS, in PEM; all three or none. `recforge ps certificates` makes a set for tests."""

    certificate: Path | None = None
    """This process's own certificate, with those between it and the authority."""
    key: Path | None = None
    """Its private key."""
    authority: Path | None = None
    """Certificate of the authority that the other side's must be from."""

    def __post_init__(self) -> None:
        given = [f"--tls.{name}" for name, file in vars(self).items() if file is not None]
        if given and len(given) < len(vars(self)):
            raise ValueError(
                f"--tls: expected --tls.certificate, --tls.key and --tls.authority, got {' and '.join(given)} alone"
            )

    @property
    def is_given(self) -> bool:
        """Whether there are such files."""
        return self.certificate is not None
