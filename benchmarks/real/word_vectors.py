"""Token vectors from pure text: the factorised mutual information of neighbours (Levy and Goldberg, 2014).

They carry what a small model learns about few words over to the words of real captions that it never trained with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MAX_TOKENS = 48
PAD, UNKNOWN = "[PAD]", "[UNK]"


def word_tokenizer(texts: Sequence[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer of whole words, the most frequent ones of the texts."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("removed")]
    )
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=[PAD, UNKNOWN], show_progress=False)
    return _trained(tokenizer, trainer, texts)


def subword_tokenizer(texts: Sequence[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer of byte pair encodings, so that a rare word falls into known parts."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("removed"), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, UNKNOWN], show_progress=False)
    return _trained(tokenizer, trainer, texts)


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, model_max_length=MAX_TOKENS
    )


def token_vectors(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, dim: int, window: int, generator: torch.Generator
) -> torch.Tensor:
    """Return a vector a token, `(vocabulary, dim)`; its length is the token's smooth inverse frequency.

    Rows are the singular vectors of the PPMI matrix times the root of the singular values. Their lengths are the
    weights 1e-3 / (1e-3 + frequency) of Arora et al. (2017), so that a sum of them passes over "the" and "is".
    Padding and unknown tokens are zero.

    Args:
        window: neighbours on either side that count.
        generator: of the random projection that starts the factorisation.
    """
    ids = [row for row in tokenizer(list(texts), verbose=False)["input_ids"] if row]
    size = len(tokenizer)
    counts = torch.zeros(size, dtype=torch.float64)
    pairs: Counter[int] = Counter()
    for row in ids:
        for position, token in enumerate(row):
            counts[token] += 1
            for neighbour in row[position + 1 : position + 1 + window]:
                pairs[token * size + neighbour] += 1
    flat = torch.tensor(list(pairs))
    left, right, number = flat // size, flat % size, torch.tensor(list(pairs.values()), dtype=torch.float64)
    left, right, number = torch.cat([left, right]), torch.cat([right, left]), torch.cat([number, number])
    joint = torch.sparse_coo_tensor(torch.stack([left, right]), number, (size, size), check_invariants=True).coalesce()
    (left, right), number = joint.indices(), joint.values()
    marginal = torch.zeros(size, dtype=torch.float64).index_add_(0, left, number)
    # Context counts to the power 3/4 keep rare neighbours from dominating (Levy, Goldberg and Dagan, 2015).
    context = marginal**0.75
    ppmi = (number * context.sum() / (marginal[left] * context[right])).log().clamp(min=0)
    matrix = torch.sparse_coo_tensor(joint.indices(), ppmi.float(), (size, size), check_invariants=True).coalesce()
    transposed = matrix.t().coalesce()
    basis = torch.randn(size, dim + 16, generator=generator)
    for _ in range(6):
        basis = torch.linalg.qr(torch.sparse.mm(matrix, torch.sparse.mm(transposed, basis))).Q
    u, singular, _ = torch.linalg.svd(torch.sparse.mm(transposed, basis).T, full_matrices=False)
    vectors = F.normalize((basis @ u[:, :dim]) * singular[:dim].sqrt(), dim=1)
    weights = 1e-3 / (1e-3 + counts / counts.sum())
    vectors *= weights.float()[:, None]
    vectors[[tokenizer.pad_token_id, tokenizer.unk_token_id]] = 0
    return vectors
