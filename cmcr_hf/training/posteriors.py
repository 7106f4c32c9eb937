"""The teacher of bridge distillation: what an item is about, told by texts, and which items are about the same.

The texts are any bank that is embedded in both spaces: of the overlap modality, so images for CLIP-ULIP.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Of a bank of 19,000 captions, 1024 texts hold 60 to 80 % of an item's posterior and give the retrieval of all.
TOP = 1024
# Items and texts at a time, 64 MiB of cosines: few searches for the largest of many cost less than many of few.
BLOCKS = (256, 65536)
# So many times the kept weights a bank may have to be multiplied whole, which costs no more than the sparse product.
DENSE = 16
# Of the choice of temperatures: texts that ask, and texts that answer. More of either move it by less than a step.
PROBES, ANSWERS = 512, 8192
# Temperatures to try, in units of the spread of an item's cosines with the texts, which is .02 in CLIP ViT-B/32 and
# .1 in small models: steps of the square root of two.
RATIOS = (0.35, 0.5, 0.71, 1.0, 1.41, 2.0)
# What rounding makes of cosines that are equal.
MIN_SPREAD = 1e-6


@dataclass
class Posteriors:
    """p(text | item) = softmax over the bank: the largest weights of every item, and the rest spread evenly.

    Args:
        texts: `(items, top)` rows of the bank, int32.
        weights: `(items, top)` their weights, exact, largest first.
        rest: `(items,)` weight of every other text, the mean of those that are not kept.
        bank: number of texts.
    """

    texts: Tensor
    weights: Tensor
    rest: Tensor
    bank: int

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def kept(self) -> float:
        """The mean share of an item's weight that is kept exactly."""
        return self.weights.sum(dim=1).mean().item()

    @property
    def cut_off(self) -> Tensor:
        """The largest error of the weight of any text, `(items,)`: the smallest weight that is kept, or 0 with all."""
        return torch.zeros_like(self.rest) if self.texts.shape[1] == self.bank else self.weights[:, -1]

    def __getitem__(self, rows: Tensor) -> Posteriors:
        return Posteriors(self.texts[rows], self.weights[rows], self.rest[rows], self.bank)

    def to(self, device: torch.device | str) -> Posteriors:
        return Posteriors(self.texts.to(device), self.weights.to(device), self.rest.to(device), self.bank)

    @property
    def nbytes(self) -> int:
        return self.texts.nbytes + self.weights.nbytes + self.rest.nbytes


def posteriors(items: Tensor, bank: Tensor, *, temperature: float, top: int = TOP) -> Posteriors:
    """Compute p(text | item) of unit rows in blocks: memory grows with items times `top`, not with the bank.

    Args:
        items: `(n, dim)`.
        bank: `(m, dim)` texts in the same space.
        temperature: of the softmax over the bank.
        top: weights that are kept of every item; all, where the bank has no more.
    """
    top = min(top, len(bank))
    texts = torch.empty(len(items), top, dtype=torch.int32, device=items.device)
    weights = torch.empty(len(items), top, device=items.device)
    for rows in _parts(len(items), BLOCKS[0]):
        texts[rows], weights[rows] = top_weights(items[rows], bank, temperature, top)
    return Posteriors(texts, weights, rest_of(weights, len(bank)), len(bank))


def rest_of(weights: Tensor, bank: int) -> Tensor:
    """Return the weight of every text that is not among those of `(items, top)` weights: `(items,)`."""
    return (1 - weights.sum(dim=1)).clamp_min(0) / max(bank - weights.shape[1], 1)


def top_weights(items: Tensor, bank: Tensor, temperature: float, top: int) -> tuple[Tensor, Tensor]:
    """Return the texts of the largest weights of some items and these, `(items, top)` both, largest first."""
    queries = normalize(items.float(), dim=1) / temperature
    total = queries.new_full((len(items),), -torch.inf)
    best, texts = queries.new_empty(len(items), 0), torch.empty(len(items), 0, dtype=torch.int64, device=items.device)
    for part in _parts(len(bank), BLOCKS[1]):
        logits = queries @ normalize(bank[part].float(), dim=1).T
        total = torch.logaddexp(total, logits.logsumexp(dim=1))
        highest, columns = logits.topk(min(top, logits.shape[1]), dim=1, sorted=False)
        best, texts = torch.cat([best, highest], dim=1), torch.cat([texts, columns + part.start], dim=1)
        if best.shape[1] > top:
            best, order = best.topk(top, dim=1, sorted=False)
            texts = texts.gather(1, order)
    best, order = best.sort(dim=1, descending=True)
    return texts.gather(1, order), (best - total[:, None]).exp()


def matches(a: Posteriors, b: Posteriors) -> Tensor:
    """Return the probability that two items draw the same text, `sum_t p(t | a) p(t | b)`: `(len(a), len(b))`.

    Off from that of whole posteriors by at most `a.cut_off + b.cut_off` of the pair.
    """
    if a.bank <= DENSE * a.texts.shape[1]:
        return _whole(a) @ _whole(b).T
    # Of weights above the rest the products are sparse; those with the rest are sums that are known.
    with warnings.catch_warnings():
        # Of the form that torch multiplies them in, which it calls beta.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        products = torch.sparse.mm(_excess(a), _excess(b).t()).to_dense()
    rest_a, rest_b = a.rest[:, None], b.rest
    return products + rest_a + rest_b - a.bank * rest_a * rest_b


def _whole(part: Posteriors) -> Tensor:
    weights = part.rest[:, None].repeat(1, part.bank)
    return weights.scatter_(1, part.texts.long(), part.weights)


def _excess(part: Posteriors) -> Tensor:
    """Return the kept weights less the rest, as a sparse matrix over the bank.

    In coordinates: the product of two compressed matrices leaks memory on a CPU (torch 2.13).
    """
    texts, order = part.texts.long().sort(dim=1)
    rows = torch.arange(len(part), device=texts.device)[:, None].expand_as(texts)
    values = (part.weights - part.rest[:, None]).gather(1, order)
    shape = (len(part), part.bank)
    return torch.sparse_coo_tensor(
        torch.stack([rows.flatten(), texts.flatten()]),
        values.flatten(),
        shape,
        is_coalesced=True,
        check_invariants=False,
    )


def choose_temperatures(
    bank_a: Tensor, memory_a: Tensor, bank_b: Tensor, memory_b: Tensor, *, seed: int = 0
) -> tuple[float, float]:
    """Choose both temperatures of posterior matching without pairs: where the memories agree best on what texts say.

    Some texts are taken out of the bank to ask. Each names its nearest item in either memory: two real items, of which
    nothing says that they belong together but that text. Matching through the *other* texts is to rank these two high
    for each other, by the mean logarithm of the rank both ways. Of the temperatures that do so no worse than the best,
    within a standard error, the sharpest pair is chosen: the target is as decided as the evidence allows.

    Args:
        bank_a, bank_b: the same texts in both spaces, row by row.
        memory_a, memory_b: items of both spaces.
        seed: of the draw of texts.

    Raises:
        ValueError: the texts are all the same to the items.
    """
    generator = torch.Generator().manual_seed(seed)
    probes = min(PROBES, len(bank_a) // 2)
    tried: list[list[float]] = []
    ranks = []
    # A small bank is divided anew until as many have asked.
    for _ in range(-(-PROBES // probes)):
        order = torch.randperm(len(bank_a), generator=generator).to(bank_a.device)
        asking, answering = order[:probes], order[probes : probes + ANSWERS]
        cosines = []
        for bank, memory in ((bank_a, memory_a), (bank_b, memory_b)):
            questions, answers = (normalize(bank[rows].float(), dim=1) for rows in (asking, answering))
            cosines.append(normalize(memory[_nearest(questions, memory)].float(), dim=1) @ answers.T)
        if not tried:
            spreads = [side.std(dim=1).mean().item() for side in cosines]
            if not min(spreads) > MIN_SPREAD:
                raise ValueError(
                    f"Expected texts that items tell apart, got cosines of the spreads {spreads[0]:.1g} and "
                    f"{spreads[1]:.1g}. Take texts that differ."
                )
            tried = [[spread * ratio for ratio in RATIOS] for spread in spreads]
        parts = [[(side / t).softmax(dim=1) for t in steps] for side, steps in zip(cosines, tried, strict=True)]
        ranks.append(torch.stack([_log_ranks(a @ b.T) for a, b in itertools.product(*parts)]))
    pairs = list(itertools.product(*tried))
    every = torch.cat(ranks, dim=1)
    worse = every - every[every.mean(dim=1).argmin()]
    # Texts that ask again tell nothing new.
    fit = worse.mean(dim=1) <= worse.std(dim=1) / min(every.shape[1], len(bank_a)) ** 0.5
    chosen = min((pair for pair, fits in zip(pairs, fit.tolist(), strict=True) if fits), key=math.prod)
    return chosen[0], chosen[1]


def _log_ranks(scores: Tensor) -> Tensor:
    """Return the logarithm of the rank of the diagonal's entries in their rows and columns, the mean of both.

    Of equal scores half come first, or a posterior so sharp that all of its products vanish would rank best.
    """
    own = scores.diagonal()
    ranks = []
    for dim, entries in ((1, own[:, None]), (0, own)):
        higher, equal = (scores > entries).sum(dim=dim), (scores == entries).sum(dim=dim)
        ranks.append((higher + (equal + 1) / 2).log())
    return (ranks[0] + ranks[1]) / 2


def _nearest(queries: Tensor, memory: Tensor) -> Tensor:
    best = queries.new_full((len(queries),), -torch.inf)
    found = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for part in _parts(len(memory), BLOCKS[1]):
        highest, rows = (queries @ normalize(memory[part].float(), dim=1).T).max(dim=1)
        found = torch.where(highest > best, rows + part.start, found)
        best = torch.maximum(best, highest)
    return found


def _parts(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))
