"""Baselines that connect two spaces through a bank of texts embedded in both, to stand beside a trained connector.

Row i of `text_a` and row i of `text_b` are the same text in space A and in space B. Every embedding is a unit row of
a float tensor (n, width); half precisions are computed in float32. Scores are (rows of a, rows of b), larger is
better.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.functional import normalize

from ..modeling.losses_cmcr import symmetric_info_nce

# Chosen without pairs: between the 0.01 of C-MCR's semantic consistency and the width of a posterior match.
BRIDGE_TEMPERATURE = 0.03
# Found with small encoders of 128 dimensions; `choose_temperatures` of cmcr_hf.training.posteriors chooses others
# where the memories are at hand.
POSTERIOR_TEMPERATURE = 0.06

# Names of those that only need the bank.
TRAINING_FREE = ("one-way bridge", "two-way bridge", "posterior matching")
# Scores of some queries, (rows, gallery).
Scorer = Callable[[slice], torch.Tensor]
# Baselines of which one direction is the transpose of the other.
_SYMMETRIC = ("unconnected", "linear map", "two-way bridge", "posterior matching")

# Bytes of the largest (queries, texts) matrix alive at once.
_BLOCK_BYTES = 2**27


def unconnected(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Score by cosine as if both spaces were one: a b^T.

    Raises:
        ValueError: the spaces have different widths.
    """
    a, b = _unit_rows("a", a), _unit_rows("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"Got widths {a.shape[1]} and {b.shape[1]}, expected equal ones for a direct cosine; leave this baseline "
            "out."
        )
    return a @ b.T


def one_way_bridge(
    a: torch.Tensor,
    text_a: torch.Tensor,
    text_b: torch.Tensor,
    b: torch.Tensor,
    *,
    temperature: float = BRIDGE_TEMPERATURE,
) -> torch.Tensor:
    """Score by carrying every row of a over the texts into space B: normalize(softmax(a text_a^T / t) text_b) b^T.

    Training-free and knows no class. The default temperature is chosen without pairs.
    """
    a, text_a, text_b, b = _checked(a, text_a, text_b, b)
    return _carried(a, text_a, text_b, temperature) @ b.T


def two_way_bridge(
    a: torch.Tensor,
    text_a: torch.Tensor,
    text_b: torch.Tensor,
    b: torch.Tensor,
    *,
    temperature: float = BRIDGE_TEMPERATURE,
) -> torch.Tensor:
    """Score by the plain mean of the one-way bridge from a to b and the transposed one from b to a.

    The two cosine matrices are averaged as they are, without standardising either. Training-free.
    """
    there = one_way_bridge(a, text_a, text_b, b, temperature=temperature)
    return (there + one_way_bridge(b, text_b, text_a, a, temperature=temperature).T) / 2


def posterior_matching(
    a: torch.Tensor,
    text_a: torch.Tensor,
    text_b: torch.Tensor,
    b: torch.Tensor,
    *,
    temperature: float | tuple[float, float] = POSTERIOR_TEMPERATURE,
) -> torch.Tensor:
    """Score by the probability of drawing the same text from both sides: s = sum_t p(t | a) p(t | b), in [0, 1].

    p(t | a) = softmax_t(a text_a^T / temperature), and p(t | b) likewise in space B. Training-free. The two spaces
    meet in probabilities only, so no vector of one modality is ever averaged into, or compared as, one of another.

    Args:
        temperature: of both spaces, or that of A and that of B.
    """
    a, text_a, text_b, b = _checked(a, text_a, text_b, b)
    of_a, of_b = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    _check_positive("temperature", min(of_a, of_b))
    partitions = _log_partition(a, text_a, of_a), _log_partition(b, text_b, of_b)
    return _matched(a, text_a, text_b, b, (of_a, of_b), partitions)


def _matched(
    a: torch.Tensor,
    text_a: torch.Tensor,
    text_b: torch.Tensor,
    b: torch.Tensor,
    temperatures: tuple[float, float],
    log_partitions: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    scores = torch.zeros(len(a), len(b), dtype=a.dtype, device=a.device)
    for texts in _blocks(len(text_a), (len(a) + len(b)) * a.element_size()):
        posterior_a, posterior_b = (
            (rows @ bank[texts].T).div_(temperature).sub_(log_partition).exp_()
            for rows, bank, temperature, log_partition in zip(
                (a, b), (text_a, text_b), temperatures, log_partitions, strict=True
            )
        )
        scores.addmm_(posterior_a, posterior_b.T)
    return scores


def _posterior_scorers(
    a: torch.Tensor, text_a: torch.Tensor, text_b: torch.Tensor, b: torch.Tensor, temperatures: tuple[float, float]
) -> tuple[Scorer, Scorer]:
    """Return both directions of [`posterior_matching`], which share what does not depend on the rows they score."""
    of_a, of_b = temperatures
    _check_positive("temperature", min(of_a, of_b))
    whole_a, whole_b = _log_partition(a, text_a, of_a), _log_partition(b, text_b, of_b)
    return (
        lambda rows: _matched(a[rows], text_a, text_b, b, (of_a, of_b), (whole_a[rows], whole_b)),
        lambda rows: _matched(b[rows], text_b, text_a, a, (of_b, of_a), (whole_b[rows], whole_a)),
    )


def closed_cascade(a: torch.Tensor, names_a: torch.Tensor, names_b: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Score by classifying a among the class names: names_b[argmax(a names_a^T)] b^T.

    It knows the closed set of classes, which an open bank or a connector does not: a yardstick of the encoders.
    """
    a, names_a, names_b, b = _checked(a, names_a, names_b, b)
    return names_b[(a @ names_a.T).argmax(dim=1)] @ b.T


def ridge_map(text_a: torch.Tensor, text_b: torch.Tensor, *, ridge: float = 0.01) -> torch.Tensor:
    """Fit a linear map W (d_a, d_b) without intercept: min_W mean_i ||a_i W - b_i||^2 + ridge / d_a ||W||^2.

    Fitted on the texts, so not training-free; solved in float64. Use it as normalize(a W) b^T.

    Args:
        ridge: penalty in units of 1 / d_a, the mean eigenvalue of the second moment of unit rows, so that its weight
            depends on neither the size of the bank nor the width. The default is chosen without pairs.
    """
    text_a, text_b = _aligned_texts(text_a, text_b)
    _check_positive("ridge", ridge)
    width = text_a.shape[1]
    penalty = ridge / width * torch.eye(width, dtype=torch.float64, device=text_a.device)
    factor = torch.linalg.cholesky(_second_moment(text_a, text_a) + penalty)
    return torch.cholesky_solve(_second_moment(text_a, text_b), factor).to(text_a.dtype)


def procrustes_map(text_a: torch.Tensor, text_b: torch.Tensor) -> torch.Tensor:
    """Fit the rotation W = U V^T (d_a, d_b) of the singular value decomposition U S V^T = text_a^T text_b.

    It maximises mean_i <a_i W, b_i> over orthogonal W (semi-orthogonal ones at unequal widths). Directions that the
    texts do not span (singular values below 1e-6 of the largest) are left out, since their rotation would be rounding
    error. Fitted on the texts, so not training-free; solved in float64. Use it as normalize(a W) b^T.
    """
    text_a, text_b = _aligned_texts(text_a, text_b)
    left, singular, right = torch.linalg.svd(_second_moment(text_a, text_b), full_matrices=False)
    spanned = singular > 1e-6 * singular[0]
    rotation: torch.Tensor = left[:, spanned] @ right[spanned]
    return rotation.to(text_a.dtype)


def cca_maps(text_a: torch.Tensor, text_b: torch.Tensor, *, ridge: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the maps W_a (d_a, k) and W_b (d_b, k) of canonical correlation analysis, k the smaller width.

    Both spaces are whitened and turned so that the texts correlate axis by axis. An axis is scaled by its correlation
    (Gong et al., 2014), or those that carry nothing would count as much as those that carry all. Moments are those of
    the rows as they are, as of the other maps here. Fitted on the texts, so not training-free; solved in float64. Use
    it as normalize(a W_a) normalize(b W_b)^T.

    Args:
        ridge: added to both second moments, in units of 1 / width, their mean eigenvalue. The default is that mean
            itself: a small one blows up directions that texts barely have and other modalities do.
    """
    text_a, text_b = _aligned_texts(text_a, text_b)
    _check_positive("ridge", ridge)
    whitening = []
    for texts in (text_a, text_b):
        values, axes = torch.linalg.eigh(_second_moment(texts, texts))
        whitening.append((axes * (values.clamp(min=0) + ridge / texts.shape[1]).rsqrt()) @ axes.T)
    first, second = whitening
    left, correlations, right = torch.linalg.svd(first @ _second_moment(text_a, text_b) @ second, full_matrices=False)
    scale = correlations.sqrt()
    # Each side takes the root, so that their product has the correlation.
    return (first @ left * scale).to(text_a.dtype), (second @ right.T * scale).to(text_b.dtype)


def linear_map(
    text_a: torch.Tensor,
    text_b: torch.Tensor,
    *,
    temperature: float = 0.07,
    steps: int = 200,
    batch: int = 512,
    seed: int = 0,
) -> torch.nn.Linear:
    """Train one linear layer (d_a to d_b, with bias) by symmetric InfoNCE on the texts.

    Text i of space A, mapped and scaled to unit length, is to find text i of space B among a batch. One layer and the
    temperature are those of CLIPCLAP (antflydb/clipclap), whose training has pairs of AudioCaps. That this one has
    texts alone is ours, and so are AdamW at 1e-3 with cosine decay, steps and batches, for seconds of work. A batch
    has no text twice: what is left of a round over all texts and fills no batch is left out. More steps fit the texts
    better, held-out ones too, and retrieve worse across modalities (800 steps at 1e-2 on the texts of the offline
    world: mAP .48 in place of .73): the layer then learns what tells two texts of one thing apart. Use it as
    normalize(map(a)) b^T.

    Args:
        seed: decides initial weights and batches; torch's global generator is left as it is.
    """
    text_a, text_b = _aligned_texts(text_a, text_b)
    _check_positive("temperature", temperature)
    text_a, text_b = text_a.float(), text_b.float()
    generator = torch.Generator().manual_seed(seed)
    layer: torch.nn.Linear = torch.nn.utils.skip_init(  # its own weights come of the global generator
        torch.nn.Linear, text_a.shape[1], text_b.shape[1], device=text_a.device
    )
    with torch.no_grad():
        bound = text_a.shape[1] ** -0.5
        layer.weight.copy_(torch.empty(layer.weight.shape).uniform_(-bound, bound, generator=generator))
        layer.bias.zero_()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(rows) < min(batch, len(text_a)):
            rows = torch.randperm(len(text_a), generator=generator)
        chosen, rows = rows[:batch].to(text_a.device), rows[batch:]
        with torch.enable_grad():
            loss = symmetric_info_nce(normalize(layer(text_a[chosen]), dim=-1), text_b[chosen], 1 / temperature)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
    return layer.requires_grad_(False)


def derange_by_name(names: Sequence[str], generator: torch.Generator) -> torch.Tensor:
    """Draw the null pairing of a bank: an index (n,) of rows in which no row meets a row of its own name.

    The distinct names are deranged, uniformly by rejection; a row is paired with a random row of the name that its own
    name maps to, and no row of that name is used a second time before all of them are used once. Use it as
    `text_b[index]`: text_a stays as it is and every true link is lost.

    Args:
        names: the name (class or text) of every row; rows of equal names count as interchangeable.
        generator: source of all randomness; the index lies on its device.

    Raises:
        ValueError: fewer than 2 distinct names.
    """
    rows_by_name: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        rows_by_name[name].append(row)
    groups = list(rows_by_name.values())
    if len(groups) < 2:
        raise ValueError(f"Got {len(groups)} distinct names, expected at least 2; pass the name of every row.")
    device = generator.device
    identity = torch.arange(len(groups), device=device)
    target = torch.randperm(len(groups), generator=generator, device=device)
    while (target == identity).any():
        target = torch.randperm(len(groups), generator=generator, device=device)
    index = torch.empty(len(names), dtype=torch.long, device=device)
    for rows, group in zip(groups, target.tolist(), strict=True):
        partners = torch.tensor(groups[group], device=device)
        rounds = -(-len(rows) // len(partners))
        drawn = [torch.randperm(len(partners), generator=generator, device=device) for _ in range(rounds)]
        index[torch.tensor(rows, device=device)] = partners[torch.cat(drawn)[: len(rows)]]
    return index


def baseline_scores(
    audio: torch.Tensor,
    image: torch.Tensor,
    text_audio_space: torch.Tensor,
    text_image_space: torch.Tensor,
    names_audio_space: torch.Tensor | None = None,
    names_image_space: torch.Tensor | None = None,
    *,
    temperature: float | None = None,
    linear: torch.nn.Linear | None = None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Score audio against images, and images against audio, with every baseline.

    Each value is (audio to image (n_audio, n_image), image to audio (n_image, n_audio)). Methods with a direction (the
    one-way bridge, the fitted maps, the cascade) start from the query's side both times; the others are transposed.
    "unconnected" is left out when the widths differ, "closed cascade" without names.

    Args:
        temperature: one temperature for both bridges and posterior matching; `None` uses each one's own default.
        linear: the [`linear_map`] of these texts, where it has been trained already.
    """
    scorers = baseline_scorers(
        audio,
        image,
        text_audio_space,
        text_image_space,
        names_audio_space,
        names_image_space,
        temperature=temperature,
        linear=linear,
    )
    every = slice(None)
    scores = {}
    for name, (there, back) in scorers.items():
        forward = there(every)
        scores[name] = (forward, forward.T if name in _SYMMETRIC else back(every))
    return scores


def baseline_scorers(
    a: torch.Tensor,
    b: torch.Tensor,
    text_a: torch.Tensor,
    text_b: torch.Tensor,
    names_a: torch.Tensor | None = None,
    names_b: torch.Tensor | None = None,
    *,
    temperature: float | None = None,
    posterior_temperatures: tuple[float, float] | None = None,
    linear: torch.nn.Linear | None = None,
) -> dict[str, tuple[Scorer, Scorer]]:
    """Return every baseline of [`baseline_scores`] as two functions: to score some rows of a, or of b, at a time.

    Args:
        posterior_temperatures: those of posterior matching in the space of a and in that of b, where they differ.
    """
    if (names_a is None) != (names_b is None):
        raise ValueError("Got class names in one space only, expected both or neither; embed them in both spaces.")
    bridge_temperature = BRIDGE_TEMPERATURE if temperature is None else temperature
    one = POSTERIOR_TEMPERATURE if temperature is None else temperature
    a, text_a, text_b, b = _checked(a, text_a, text_b, b)

    scorers = {}
    if a.shape[1] == b.shape[1]:
        scorers["unconnected"] = (inner_scorer(a, b), inner_scorer(b, a))
    for name, fit in (("ridge", ridge_map), ("procrustes", procrustes_map)):
        scorers[name] = (
            inner_scorer(normalize(a @ fit(text_a, text_b), dim=-1), b),
            inner_scorer(normalize(b @ fit(text_b, text_a), dim=-1), a),
        )
    layer = linear or linear_map(text_a, text_b)
    mapped, single = normalize(layer(a.float()), dim=-1), b.float()
    scorers["linear map"] = (inner_scorer(mapped, single), inner_scorer(single, mapped))
    carried_a, carried_b = (
        _carried(a, text_a, text_b, bridge_temperature),
        _carried(b, text_b, text_a, bridge_temperature),
    )
    scorers["one-way bridge"] = (inner_scorer(carried_a, b), inner_scorer(carried_b, a))
    both_a, both_b = torch.cat([carried_a, a], 1), torch.cat([b, carried_b], 1) / 2
    scorers["two-way bridge"] = (inner_scorer(both_a, both_b), inner_scorer(both_b, both_a))
    scorers["posterior matching"] = _posterior_scorers(a, text_a, text_b, b, posterior_temperatures or (one, one))
    if names_a is not None and names_b is not None:
        scorers["closed cascade"] = (
            lambda rows: closed_cascade(a[rows], names_a, names_b, b),
            lambda rows: closed_cascade(b[rows], names_b, names_a, a),
        )
    return scorers


def inner_scorer(a: torch.Tensor, b: torch.Tensor) -> Scorer:
    """Return the function that scores some rows of a by their inner products with all of b."""
    return lambda rows: a[rows] @ b.T


def two_hop_scores(
    a: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    b: torch.Tensor,
    names_a: torch.Tensor | None = None,
    names_between: torch.Tensor | None = None,
    *,
    linear: tuple[torch.nn.Linear, torch.nn.Linear] | None = None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Score two spaces that share nothing with each other, but each a modality with a space between them.

    The baselines are those of [`baseline_scores`], carried over both banks: maps one after the other, bridges one
    after the other, and posterior matching over the last bank of what the first one carried. Each direction starts at
    its query.

    Args:
        first: `(items, dim)` of one bank, the same items row by row in the space of a and in that between.
        second: those of the other bank, in the space between and in that of b.
        names_a, names_between: a phrase a class in both of these spaces, for the closed cascade.
        linear: the [`linear_map`] of a, and that of b, into the space between, where they have been trained already.
    """
    a, *checked = _checked(a, *first, first[1])
    first = (checked[0], checked[1])
    *checked, b = _checked(second[0], *second, b)
    second = (checked[1], checked[2])
    scores = {}
    if a.shape[1] == b.shape[1]:
        cosine = unconnected(a, b)
        scores["unconnected"] = (cosine, cosine.T)
    for name, fit in (("ridge", ridge_map), ("procrustes", procrustes_map)):
        scores[name] = (
            normalize(normalize(a @ fit(*first), dim=-1) @ fit(*second), dim=-1) @ b.T,
            normalize(normalize(b @ fit(*second[::-1]), dim=-1) @ fit(*first[::-1]), dim=-1) @ a.T,
        )
    of_a, of_b = linear or (linear_map(*first), linear_map(*second[::-1]))
    mapped = normalize(of_a(a.float()), dim=-1) @ normalize(of_b(b.float()), dim=-1).T
    scores["linear map"] = (mapped, mapped.T)
    carried_a, carried_b = (
        _carried(rows, *bank, BRIDGE_TEMPERATURE) for rows, bank in ((a, first), (b, second[::-1]))
    )
    there = one_way_bridge(carried_a, *second, b)
    back = one_way_bridge(carried_b, *first[::-1], a)
    scores["one-way bridge"] = (there, back)
    scores["two-way bridge"] = ((there + back.T) / 2, (there.T + back) / 2)
    scores["posterior matching"] = (
        posterior_matching(carried_a, *second, b),
        posterior_matching(carried_b, *first[::-1], a),
    )
    if names_a is not None and names_between is not None:
        named = names_between[(a @ names_a.T).argmax(dim=1)]
        scores["closed cascade"] = (
            one_way_bridge(named, *second, b),
            closed_cascade(carried_b, names_between, names_a, a),
        )
    return scores


def _carried(a: torch.Tensor, text_a: torch.Tensor, text_b: torch.Tensor, temperature: float) -> torch.Tensor:
    """Carry every row of a over the texts into space B, to unit length."""
    _check_positive("temperature", temperature)
    carried = torch.empty(len(a), text_b.shape[1], dtype=text_b.dtype, device=text_b.device)
    for rows in _blocks(len(a), len(text_a) * a.element_size()):
        carried[rows] = _softmax_(a[rows] @ text_a.T, temperature) @ text_b
    return normalize(carried, dim=-1)


def _checked(
    a: torch.Tensor, text_a: torch.Tensor, text_b: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b = _unit_rows("a", a), _unit_rows("b", b)
    text_a, text_b = _aligned_texts(text_a, text_b)
    for side, rows, texts in (("a", a, text_a), ("b", b, text_b)):
        if rows.shape[1] != texts.shape[1]:
            raise ValueError(
                f"Got {side} of width {rows.shape[1]} and its texts of width {texts.shape[1]}, expected one space; "
                "check the order a, text_a, text_b, b."
            )
    return a, text_a, text_b, b


def _aligned_texts(text_a: torch.Tensor, text_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if len(text_a) != len(text_b):
        raise ValueError(
            f"Got {len(text_a)} texts in space A and {len(text_b)} in space B, expected the same texts row by row; "
            "embed one list with both text encoders."
        )
    return _unit_rows("text_a", text_a), _unit_rows("text_b", text_b)


def _unit_rows(name: str, embeds: torch.Tensor) -> torch.Tensor:
    if embeds.dim() != 2 or embeds.numel() == 0 or not embeds.is_floating_point():
        raise ValueError(
            f"Got {name} of shape {tuple(embeds.shape)} and type {embeds.dtype}, expected float rows (n, width); pass "
            "a filled matrix."
        )
    norms = torch.linalg.vector_norm(embeds, dim=1, dtype=torch.promote_types(embeds.dtype, torch.float32))
    # bfloat16 keeps 8 bits, so the norm of a rounded unit row may be off by thousandths. NaN fails the comparison.
    unit = (norms - 1).abs() < 1e-2
    if not unit.all():
        raise ValueError(
            f"Got {name} with a row of norm {norms[~unit][0].item():.4g}, expected unit rows; normalize the "
            "embeddings first."
        )
    return embeds.detach().to(norms.dtype)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"Got {name}={value}, expected a positive number; pass {name}= above 0.")


def _blocks(rows: int, bytes_a_row: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // bytes_a_row)
    return (slice(begin, begin + step) for begin in range(0, rows, step))


def _softmax_(cosine: torch.Tensor, temperature: float) -> torch.Tensor:
    """Turn cosines into softmax(cosine / temperature) in place, so that a block is held once."""
    weights = cosine.sub_(cosine.amax(1, keepdim=True)).div_(temperature).exp_()
    return weights.div_(weights.sum(1, keepdim=True))


def _log_partition(queries: torch.Tensor, texts: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log sum_t exp(queries texts^T / temperature), (n, 1)."""
    blocks = _blocks(len(queries), len(texts) * queries.element_size())
    return torch.cat([(queries[rows] @ texts.T).div_(temperature).logsumexp(1, keepdim=True) for rows in blocks])


def _second_moment(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return mean_i a_i^T b_i in float64, without a float64 copy of the bank."""
    moment = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for rows in _blocks(len(a), 8 * (a.shape[1] + b.shape[1])):
        moment.addmm_(a[rows].double().T, b[rows].double())
    return moment / len(a)
