"""What a rank keeps of a step: its share of the tensors, copied to CPU memory, to be written while training goes on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mellow_ds.checkpoint.staging import Staging
from mellow_ds.checkpoint.step_folder import MODEL, OPTIMIZER
from mellow_ds.checkpoint.tensor_files import file_name, index_name, index_text, part_name
from mellow_ds.engine.protocol import Engine, SavedParameter

MOMENT_SEPARATOR = "::"
NUM_UPDATES = "num_updates"


@dataclass
class Snapshot:
    """One rank's share, and on every rank who has the rest.

    A weight goes to the rank that holds most of it already; of those that hold as much, to the one that has the fewest
    bytes so far; moments stay where they lie. All ranks see the same names and sizes in the same order, so they agree
    without a word, and shares differ by about one parameter.
    """

    rank: int
    num_ranks: int
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: {MODEL: {}, OPTIMIZER: {}})  # own
    owners: dict[str, dict[str, int]] = field(default_factory=lambda: {MODEL: {}, OPTIMIZER: {}})  # of all, by stem
    stem_bytes: dict[str, int] = field(default_factory=lambda: {MODEL: 0, OPTIMIZER: 0})  # over all ranks
    rank_bytes: list[int] = field(default_factory=list)
    assigned: dict[str, int] = field(default_factory=dict)
    staging: Staging = field(default_factory=Staging)

    def __post_init__(self) -> None:
        self.rank_bytes = [0] * self.num_ranks

    @property
    def num_bytes(self) -> int:
        """Of the tensors of all ranks."""
        return sum(self.rank_bytes)

    def owner(self, name: str, held: Sequence[int] = ()) -> int:
        """See `mellow_ds.engine.owner.Keeper`."""
        most = max(held, default=0)
        able = [rank for rank in range(self.num_ranks) if not held or held[rank] == most]
        owner = min(able, key=lambda rank: self.rank_bytes[rank])
        self.assigned[name] = owner
        return owner

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """See `mellow_ds.engine.owner.Keeper`."""
        return self.staging.empty(shape, dtype)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a weight or buffer that was assigned; keep it where this rank shall."""
        self._take(MODEL, name, self.assigned[name], tensor.nbytes, tensor)

    def add_parameter(self, saved: SavedParameter) -> None:
        """Take a trained parameter: the weight as it was assigned, each rank's part of a moment with that rank."""
        self.add(saved.name, saved.weight)
        count = torch.tensor(saved.num_updates)
        self._take(OPTIMIZER, moment_name(saved.name, NUM_UPDATES), self.assigned[saved.name], count.nbytes, count)
        for key, own in saved.moments.items():
            for rank, (start, length) in enumerate(saved.places):
                if length:
                    part = part_name(moment_name(saved.name, key), start)
                    self._take(OPTIMIZER, part, rank, length * own.itemsize, own)

    def _take(self, stem: str, name: str, rank: int, num_bytes: int, tensor: torch.Tensor) -> None:
        self.owners[stem][name] = rank
        self.stem_bytes[stem] += num_bytes
        self.rank_bytes[rank] += num_bytes
        if rank == self.rank:
            self.tensors[stem][name] = tensor.contiguous()

    def files(self) -> dict[str, dict[str, torch.Tensor]]:
        """The files that this rank writes: name -> tensors."""
        return {self._files(stem)[self.rank]: tensors for stem, tensors in self.tensors.items() if tensors}

    def indices(self) -> dict[str, str]:
        """The index files, name -> text: where tensors of several ranks are."""
        found = {}
        for stem, owners in self.owners.items():
            files = self._files(stem)
            if len(files) > 1:
                by_name = {name: files[owner] for name, owner in sorted(owners.items())}
                found[index_name(stem)] = index_text(by_name, self.stem_bytes[stem])
        return found

    def _files(self, stem: str) -> dict[int, str]:
        """Rank -> file, of the ranks that have something."""
        ranks = sorted(set(self.owners[stem].values()))
        return {rank: file_name(stem, number, len(ranks)) for number, rank in enumerate(ranks, start=1)}


def take_snapshot(engine: Engine, rank: int, num_ranks: int, staging: Staging | None = None) -> Snapshot:
    """Gather weights one at a time and copy this rank's share of all into `staging`; a collective call."""
    snapshot = Snapshot(rank, num_ranks, staging=staging or Staging())
    snapshot.staging.reset()
    for saved in engine.saved_parameters(snapshot):
        snapshot.add_parameter(saved)
    for name, tensor in engine.fixed_states(snapshot):
        snapshot.add(name, tensor)
    return snapshot


def moment_name(parameter: str, key: str) -> str:
    """What a moment, or the count of updates, of a parameter is called."""
    return parameter + MOMENT_SEPARATOR + key
