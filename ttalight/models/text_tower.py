"""The text tower of a vision-language model: from texts, tokens or token embeddings to features."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ttalight.errors import InputError, InputTypeError
from ttalight.models.image_tower import pooled
from ttalight.models.two_towers import text_half

__all__ = ["TextTower"]


class TextTower(nn.Module):
    """The text tower of a model, frozen. Gradients pass through it to token embeddings and to other parameters.

    The parameters are never changed: methods that adapt some of them have tensors of their own, and pass these. So
    copies of a task share one tower, and ``deepcopy`` returns it.

    A causal transformer of open_clip that reads the end of a text is given texts without the padding behind the
    longest, which changes nothing and saves most of the time.

    Args:
        model: A model with ``encode_text`` (open_clip) or ``get_text_features`` (transformers).
        tokenizer: Maps N texts to tokens, (N, length): a tokenizer of open_clip or of transformers, or a function.

    Raises:
        ValueError: If the model encodes no texts.
    """

    def __init__(self, model: nn.Module, tokenizer: Callable[..., Any]) -> None:
        super().__init__()
        if not (hasattr(model, "encode_text") or hasattr(model, "get_text_features")):
            raise InputError(
                f"{type(model).__name__} encodes no texts: it has neither encode_text (open_clip) nor "
                "get_text_features (transformers)"
            )
        self.model, self.tokenizer = text_half(model), tokenizer
        self.requires_grad_(False).eval()
        #: Name of the module whose positions and mask may be cut to the length of the texts; None if none may.
        self._causal = next((name for name in ("", "text") if _is_causal(self.model, name)), None)

    def __deepcopy__(self, memo: Any) -> TextTower:
        return self

    def converted(self, like: Tensor) -> TextTower:
        """Return the tower on the device and in the floating-point type of a tensor: a copy where it has others."""
        own = next(self.parameters())
        if (own.device, own.dtype) == (like.device, like.dtype):
            return self
        return TextTower(copy.deepcopy(self.model), self.tokenizer).to(like.device, like.dtype)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the tokens of N texts, (N, length), on the device of the tower.

        Raises:
            TypeError: If the tokenizer returns something else.
            ValueError: If a token is none of the tower's.
        """
        if hasattr(self.tokenizer, "model_input_names"):  # transformers
            options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            tokens: Tensor = self.tokenizer(list(texts), **options)["input_ids"]
        else:
            tokens = self.tokenizer(list(texts))
        self._check_tokens(tokens, len(texts))
        if self._causal is not None:
            tokens = tokens[:, : int(tokens.argmax(1).max()) + 1]
        return tokens.to(next(self.parameters()).device)

    def _check_tokens(self, tokens: Any, count: int) -> None:
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or len(tokens) != count:
            seen = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise InputTypeError(
                f"tokenizer must map {count} texts to a tensor of tokens, ({count}, length), got {seen}"
            )
        known = next((layer.num_embeddings for layer in self._embeddings()), None)
        if known is not None and bool((tokens >= known).any()):
            raise InputError(
                f"tokenizer makes token {int(tokens.max())}, and the text tower has {known} tokens: give the tokenizer "
                "of this model"
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens, (N, length, W), without those of their positions."""
        embeddings: Tensor = self._embedding()(tokens)
        return embeddings

    def encode_text(
        self, tokens: Tensor, embeddings: Tensor | None = None, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return features, (N, D), of any length, with gradients to embeddings and parameters.

        Args:
            tokens: (N, length); they say where a text ends.
            embeddings: (N, length, W), which replace those of the tokens.
            parameters: Tensors in the place of the tower's own parameters, by name.
        """
        values = {**self._cut(tokens.shape[1]), **(parameters or {})}
        if embeddings is None:
            return self._call(values, tokens)
        hook = self._embedding().register_forward_hook(lambda *_: embeddings)
        try:
            return self._call(values, tokens)
        finally:
            hook.remove()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return features, (N, D), of tokens as long as the model reads them; see ``encode_text``."""
        encode: Any = getattr(self.model, "encode_text", None)
        return pooled(encode(tokens) if encode is not None else self.model.get_text_features(input_ids=tokens))  # type: ignore[operator]

    def norm_affines(self) -> dict[str, nn.Parameter]:
        """Return the weights and biases of the normalisation layers, by name."""
        return {
            f"{name}.{part}": value
            for name, module in self.named_modules()
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm))
            for part, value in module.named_parameters(recurse=False)
        }

    def _call(self, values: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        features: Tensor = functional_call(self, dict(values), (tokens,)) if values else self(tokens)
        return features

    def _cut(self, length: int) -> dict[str, Tensor]:
        """Return positions and mask of texts of this length, by name, where they are not those of the model."""
        if self._causal is None:
            return {}
        owner: Any = self.model.get_submodule(self._causal)
        if length >= len(owner.positional_embedding):
            return {}
        prefix = ".".join(filter(None, ("model", self._causal)))
        return {
            f"{prefix}.positional_embedding": owner.positional_embedding[:length],
            f"{prefix}.attn_mask": owner.attn_mask[:length, :length],
        }

    def _embedding(self) -> nn.Embedding:
        for layer in self._embeddings():
            return layer
        raise InputError(f"{type(self.model).__name__} has no layer token_embedding, so its prompts cannot be tuned")

    def _embeddings(self) -> Iterator[nn.Embedding]:
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding) and name.endswith("token_embedding"):
                yield module


def _is_causal(model: nn.Module, name: str) -> bool:
    """Return whether a module is a transformer of open_clip in which no token sees a later one, nor the padding."""
    owner: Any = dict(model.named_modules()).get(name)
    mask, positions = getattr(owner, "attn_mask", None), getattr(owner, "positional_embedding", None)
    if not (isinstance(mask, Tensor) and isinstance(positions, Tensor)) or mask.shape != 2 * positions.shape[:1]:
        return False
    later = torch.ones_like(mask, dtype=torch.bool).triu(1)
    pool = getattr(owner, "text_pool_type", getattr(owner, "pool_type", None))
    has_more = getattr(owner, "use_pad_mask", False) or getattr(owner, "cls_emb", None) is not None
    return pool == "argmax" and not has_more and bool((mask[later] == -torch.inf).all())
