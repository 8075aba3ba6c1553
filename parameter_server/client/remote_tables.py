"""Tables on shards behind the interface of all tables, so that models, loop and metrics need not know where rows lie.

A batch's pushes belong to places in its lane, which whoever drives the loop says before the batch is trained::

    tables.enter(following.sparse, PushPlace(lease, clock + 1))
    tables.prefetch(following.sparse)                    # its rows begin to come
    loss.backward()                                      # the gradients of the batch before it leave
    tables(following.sparse)                             # waits for its rows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embeddings.asking import AskingTables, Begun, PooledTables, UnpooledTables
from embeddings.interface import FarTable
from parameter_server.client.remote_rows import PushPlace, RemoteRequest, RemoteRows
from parameter_server.client.remote_storage import RemoteStorage
from parameter_server.client.rows_client import RowsClient
from parameter_server.description import RunDescription


class AskingShards(AskingTables):
    """What pooled and unpooled tables on shards have in common.

    In evaluation mode rows are pulled, and nothing else happens: a row that no push has created is as it would be born.

    Args:
        description: Of the run, whose tables these are: all of them, as a batch makes one push of each.
        client: Pulls and pushes.
        gate: See ``RemoteRows``.
        storage: Of the same run, for checkpoints and statistics of whole tables; None where there are none.
    """

    def __init__(
        self,
        description: RunDescription,
        client: RowsClient,
        *,
        gate: Callable[[], None] | None = None,
        storage: RemoteStorage | None = None,
    ) -> None:
        remote = RemoteRows(description, client, gate=gate)
        super().__init__(description.tables, remote)
        self._remote = remote
        self.description, self._storage = description, storage
        self._places: list[tuple[KeyedJaggedTensor, PushPlace]] = []
        self._trained: KeyedJaggedTensor | None = None  # the batch that was looked up in training last

    def enter(self, features: KeyedJaggedTensor, *places: PushPlace) -> None:
        """Says where the pushes of a batch belong, before it is prefetched or looked up in training.

        A batch that is looked up again, for a further pass over it, sees what the pass before it has changed.

        Args:
            features: The batch, the object itself; each look-up in training uses up one of its places.
            places: No other batch's, in the order of their clocks.
        """
        self._places = [known for known in self._places if known[0] is not features]
        self._places += [(features, place) for place in places]

    def forget(self) -> None:
        """Forgets batches that were entered, prefetched or looked up and are not to be trained: of a lost lease."""
        self._places.clear()
        self._trained = None
        self._begun.clear()
        self._remote.forget()

    @property
    def last_push(self) -> Future[None]:
        """Of the batch whose backward came by last: done once all shards have acknowledged it."""
        return self._remote.last_push

    def drain(self) -> None:
        """Waits until every push so far is acknowledged; raises the error of one that has failed."""
        self._remote.drain()

    def close(self) -> None:
        """Waits and raises as ``drain`` does, and forgets what was begun; the client is its owner's to close."""
        try:
            self.drain()
        finally:
            self.forget()

    @override
    def far_tables(self) -> Sequence[FarTable]:
        if self._storage is None:
            raise ValueError(
                "tables on shards: expected storage=RemoteStorage(...) to read or write them whole, got none"
            )
        self.drain()
        return self._storage.tables()

    @override
    def _begin(self, features: KeyedJaggedTensor) -> Begun:
        begun = super()._begin(features)
        request = begun.request
        assert isinstance(request, RemoteRequest)
        if not self.training:
            self._remote.start(request, may_lag=False)
        elif self.description.staleness != 0:
            self._remote.start(request, may_lag=features is not self._trained)
        return begun

    @override
    def _take(self, features: KeyedJaggedTensor) -> Begun:
        place = self._take_place(features) if self._is_trained() else None
        begun = super()._take(features)
        assert isinstance(begun.request, RemoteRequest)
        begun.request.place = place
        self._trained = features if place is not None else self._trained
        return begun

    def _take_place(self, features: KeyedJaggedTensor) -> PushPlace:
        for at, (known, place) in enumerate(self._places):
            if known is features:
                del self._places[at]
                return place
        raise ValueError(
            "batch: expected enter(features, place) before each look-up in training, as its pushes need a place in a "
            "lane, got none; call it, or model.eval() where nothing is to be trained"
        )


class RemoteTables(AskingShards, PooledTables):
    """Tables on shards that give one vector per bag; see ``AskingShards``."""


class RemoteSequenceTables(AskingShards, UnpooledTables):
    """Tables on shards that give one vector per id; see ``AskingShards``."""
