"""Prompts of class names whose first words are vectors instead of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.models.text_tower import TextTower

__all__ = ["TunedPrompts"]


class TunedPrompts:
    """The sentences "<words> <name>." of all classes, whose words are replaced by vectors of the same number.

    Args:
        tower: The text tower.
        names: Names of the C classes.
        words: Words in front of a name.

    Raises:
        ValueError: If the tokenizer does not begin the sentences with the tokens of the words.
    """

    def __init__(self, tower: TextTower, names: list[str], words: str) -> None:
        self.tower = tower
        self.tokens = tower.tokenize([f"{words} {name}." for name in names])
        alone, others = tower.tokenize([words])[0], tower.tokenize(["a", "the"])[:, 0]
        begin = int(others[0] == others[1])  # a token that begins every text
        length = min(len(alone), self.tokens.shape[1])
        shared = int((self.tokens[:, :length] == alone[:length]).all(0).long().cumprod(0).sum())
        if shared <= begin:
            raise InputError(f"the tokens of the prompt {words!r} do not begin those of {words!r} and a name")
        embeddings = tower.embed(self.tokens).detach()
        self._begin, self._rest = embeddings[:, :begin], embeddings[:, shared:]
        #: Embeddings of the words, (P, W).
        self.initial = embeddings[0, begin:shared].clone()

    def encode(self, vectors: Tensor) -> Tensor:
        """Return the features of all classes, (B, C, D), of any length, with gradients to the vectors.

        Args:
            vectors: In place of the words, (B, P, W), for B prompts.
        """
        count, classes = len(vectors), len(self.tokens)
        parts = (
            self._begin.expand(count, -1, -1, -1),
            vectors[:, None].expand(-1, classes, -1, -1),
            self._rest.expand(count, -1, -1, -1),
        )
        embeddings = torch.cat(parts, dim=2).flatten(0, 1)
        features = self.tower.encode_text(self.tokens.repeat(count, 1), embeddings)
        return features.view(count, classes, -1)
