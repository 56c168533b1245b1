"""How sparse the attention of a network is: probabilities that are quantised to 0."""

from dataclasses import dataclass

import torch


@dataclass
class HeadSparsity:
    """
    Sums over images of one layer's attention, for each head.

    Attributes:
        zero: number of probabilities that are 0, `(heads,)`.
        empty: number of queries whose probabilities are all 0, `(heads,)`. They attend to nothing.
        queries: number of queries of a head, of all images.
        keys: number of keys of a query.
    """

    zero: torch.Tensor
    empty: torch.Tensor
    queries: int
    keys: int

    @classmethod
    def of(cls, probabilities: torch.Tensor) -> "HeadSparsity":
        """Args: probabilities: quantised, `(images, heads, queries, keys)`."""
        is_zero = probabilities == 0
        images, _, queries, keys = probabilities.shape
        return cls(is_zero.sum((0, 2, 3)), is_zero.all(-1).sum((0, 2)), images * queries, keys)

    def __add__(self, other: "HeadSparsity") -> "HeadSparsity":
        return HeadSparsity(self.zero + other.zero, self.empty + other.empty, self.queries + other.queries, self.keys)

    @property
    def shares(self) -> list[float]:
        """Share of zeros of each head."""
        return [zero / (self.queries * self.keys) for zero in self.zero.tolist()]

    @property
    def empty_shares(self) -> list[float]:
        """Share of queries of each head that attend to nothing."""
        return [empty / self.queries for empty in self.empty.tolist()]
