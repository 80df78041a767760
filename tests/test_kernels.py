"""8 and 4 bits: the C against plain loops, the model against model.py, and what it refuses."""
import os
import shutil
import sys
import threading
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convert
from generate import replies
from kernels import library, quantised
from kernels.quantised import GROUP, Matrix, Quantised, pack, packed, rounded, unpack
from model import KVCache, ModelConfig, Transformer
from plumbing.loading import load_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None,
                                reason="needs a C compiler")
SHAPES = {  # vocabularies that are no multiple of 16; Qwen3, Llama 3.1 and Qwen2 in small
    "qwen3": ModelConfig(323, 3, 6, 2, 96, 32, 160, 96),
    "llama": ModelConfig(323, 2, 4, 4, 64, 64, 96, 96, tied=False, qk_norm=False,
                         rope_scaling=(8.0, 1.0, 4.0, 32.0)),
    "qwen2": ModelConfig(320, 2, 4, 1, 64, 16, 64, 96, qk_norm=False, qkv_bias=True)}


def made(config):
    """A model with weights that say something."""
    torch.manual_seed(0)
    model = Transformer(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.2 * torch.randn_like(p)) if p.dim() == 1 else p.mul_(3)
    return model


def fast(model, bits):
    return Quantised(model.config, pack(model.config, model.state_dict(), bits))


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    return made(SHAPES[request.param])


def as_int8(x):
    """Rounded to int8, with a scale for each group of 32: what the products are given."""
    groups = x.unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return (torch.round((groups / scale).nan_to_num(0.0)) * scale).flatten(-2)


class RoundingLinear(nn.Linear):
    def forward(self, x):
        return F.linear(as_int8(x), self.weight, self.bias)


def plain(model, tensors):
    """model.py with the rounded weights, whose products round their inputs."""
    twin = Transformer(model.config).eval().requires_grad_(False)
    twin.load_state_dict(unpack(model.config, tensors))
    for module in twin.modules():
        if type(module) is nn.Linear:
            module.__class__ = RoundingLinear
    return twin


def grid(bits, minimum):
    """Weights (48, 192) that lie on a grid: q, scale and start of each group."""
    r = torch.Generator().manual_seed(bits + minimum)
    q = torch.randint(0, 2**bits, (48, 6, GROUP), generator=r)
    q[..., 0], q[..., 1] = 0, 2**bits - 1  # the ends occur, as in what others have rounded
    q = q.clamp(1) if bits == 8 else q
    scale = (torch.rand(48, 6, 1, generator=r) + 0.1).half().float() / 64
    low = torch.randn(48, 6, 1, generator=r).half().float() / 8
    return (q * scale + low if minimum else (q - 2**(bits - 1)) * scale).flatten(1)


@pytest.mark.parametrize("bits, minimum", [(8, False), (4, False), (4, True)])
def test_weights_that_lie_on_such_a_grid_already_lose_nothing(bits, minimum):
    """Q8_0, Q4_0 and Q4_1 of GGUF files, which a second rounding would spoil. Seen to fail with the
    largest number as 7 instead of -8, and with scales in bf16."""
    W = grid(bits, minimum)
    parts = packed(W, bits)
    assert ("min" in parts) == minimum
    torch.testing.assert_close(Matrix(parts, 48).weight, W, rtol=0, atol=1e-6)


def test_a_group_that_does_not_use_all_steps_of_its_grid_keeps_it_too():
    """As in Q4_K, whose groups share their scale with others: here they hold 11 to 16 steps."""
    r = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (48, 6, GROUP), generator=r)
    q = torch.minimum(q, torch.randint(10, 16, (48, 6, 1), generator=r))
    W = (q * 0.25 - 2).flatten(1)
    assert torch.equal(Matrix(packed(W, 4), 48).weight, W)


def test_rounding_is_as_good_as_it_can_be():
    """No weight is further from its rounded one than half a step, and half a step more at 4 bits,
    where +8 does not exist and becomes 7."""
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for bits, steps in ((8, 0.51), (4, 1.01)):
        _, scale = rounded(W.unflatten(1, (-1, GROUP)), bits, minimum=False)
        error = (Matrix(packed(W, bits), 32).weight - W).unflatten(1, (-1, GROUP)).abs()
        assert (error <= steps * scale.abs()[..., None].float()).all()


MACHINES = {"native": ["-march=native"], "avx2": ["-march=x86-64-v3"], "plain": ["-march=x86-64"]}


@pytest.fixture(params=MACHINES)
def machine(request, monkeypatch, tmp_path):
    """The C for an older processor, in place of that for this one."""
    def runs_here():
        with open("/proc/cpuinfo") as f:
            return request.param == "native" or " avx2 " in f.read()
    if not os.path.exists("/proc/cpuinfo") or not runs_here():
        pytest.skip("needs a processor with AVX2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "TRIES", [MACHINES[request.param] + ["-fopenmp"]])
    library.library.cache_clear()
    yield request.param
    library.library.cache_clear()


@pytest.mark.parametrize("bits, minimum", [(8, False), (4, False), (4, True)])
def test_products_are_those_of_a_plain_loop(machine, bits, minimum):
    """For any number of rows, on every kind of processor that this one can be; and a row has the
    same product whatever rows are beside it. Seen to fail with the halves of the bytes swapped, a
    forgotten minimum, and the sign of AVX2."""
    W, x = grid(bits, minimum), torch.randn(13, 192, generator=torch.Generator().manual_seed(1))
    x[3] = 0
    x[4, :GROUP] *= 1e-30
    matrix = Matrix(packed(W, bits), 48)
    want = (as_int8(x.double()) @ W.double().t()).float()
    got = matrix(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for rows in range(1, 13):
        assert torch.equal(matrix(x[:rows]), got[:rows])


def test_nothing_that_is_no_number_is_hidden():
    """Rounding NaN to an integer would make a number of it."""
    matrix, x = Matrix(packed(grid(8, False), 8), 48), torch.ones(3, 192)
    x[0, 5], x[1, 150] = torch.nan, torch.inf
    assert matrix(x).isfinite().all(-1).tolist() == [False, False, True]


@pytest.mark.parametrize("bits", [8, 4])
def test_the_decoder_is_that_of_model_py(machine, bits):
    """Logits of model.py with the same weights, whose products round their inputs too, agree to
    1e-4. A text is on its own from the first input that lies so near the middle of two integers
    that the two round it differently; few do within 8 tokens, and some texts of 70 do not, which
    attend to more tokens than C takes at once. Seen to fail for each line of `decode` left out."""
    for config in SHAPES.values():
        model = made(config)
        f = fast(model, bits)
        twin = plain(model, f.tensors)
        for rows, T in ((16, 8), (6, 70)):
            ids = torch.randint(320, (rows, T), generator=torch.Generator().manual_seed(2))
            want = twin(ids)
            error = ((f(ids) - want).abs() / want.std()).amax(-1)  # (rows, T)
            assert error.max() < 0.2
            assert (error < 1e-4).float().mean() > 0.8 if T == 8 else error[:, -1].min() < 1e-4


def test_eight_bits_are_close_to_the_model_and_four_a_little(model):
    ids = torch.randint(320, (2, 70), generator=torch.Generator().manual_seed(2))
    want = model(ids)
    eight, four = ((fast(model, bits)(ids) - want).norm() / want.norm() for bits in (8, 4))
    assert eight < 0.05 and 2 * eight < four < 0.5


@pytest.mark.parametrize("bits", [8, 4])
def test_texts_are_the_same_to_the_last_bit_however_they_are_computed(model, bits):
    """With a cache or without, in chunks of any size, alone or in a padded batch."""
    f, cut = fast(model, bits), [0, 2, 7]
    ids = torch.randint(320, (3, 75), generator=torch.Generator().manual_seed(2))
    alone = [f(ids[b:b + 1, pad:]) for b, pad in enumerate(cut)]
    for chunks in ([75], [70, 1, 1, 1, 2], [9, 66], [1] * 75):
        cache = KVCache(f.config, 3, 80, cut)
        got = torch.cat([f(part, cache) for part in ids.split(chunks, dim=1)], dim=1)
        assert cache.length == 75
        for b, pad in enumerate(cut):
            assert torch.equal(got[b:b + 1, pad:], alone[b])
    assert torch.equal(f.lm_head(f(ids, hidden=True)), f(ids))


def test_the_cache_may_be_some_rows_of_a_larger_one(model):
    """As in a server, where texts come and go. Seen to fail with the distance of a whole cache."""
    f, ids = fast(model, 8), torch.randint(320, (2, 9))
    cache, want = KVCache(f.config, 5, 16), f(ids)
    whole = cache.kv.fill_(7.0)
    cache.kv, cache.pad = whole[:, :, :2], cache.pad[:2]
    assert torch.equal(torch.cat([f(part, cache) for part in ids.split(3, dim=1)], dim=1), want)
    assert (whole[:, :, 2:] == 7).all() and (whole[..., 9:, :] == 7).all()


def test_generate_writes_the_same_alone_and_in_a_batch(model):
    f, prompts = fast(model, 8), [[5], [7, 8, 9], [3, 1, 4, 1, 5, 9, 2, 6]]
    want = [replies(f, [prompt], 30, temperature=0.0)[0] for prompt in prompts]
    assert replies(f, prompts, 30, temperature=0.0) == want
    assert replies(f, prompts, 30, temperature=0.0, cache=False) == want


@pytest.mark.skipif(sys.platform != "linux", reason="pages of 2 MB are asked of Linux only")
def test_weights_are_copied_to_large_pages_one_after_the_other(model):
    """Each begins where a line of the cache does, so that no product reads one more."""
    once = pack(model.config, model.state_dict(), 4)
    held = Quantised(model.config, once).tensors
    assert held.keys() == once.keys() and all(torch.equal(held[k], once[k]) for k in once)
    places = [(t.data_ptr(), t.nbytes) for t in held.values()]
    assert all(at % 64 == 0 for at, _ in places)
    assert all(a + n <= b for (a, n), (b, _) in zip(places, places[1:]))


def test_what_is_packed_can_be_unpacked(model):
    """To the weights that the products use: packing them again changes nothing."""
    once = pack(model.config, model.state_dict(), 8)
    again = pack(model.config, unpack(model.config, once), 8)
    assert once.keys() == again.keys() and all(torch.equal(once[k], again[k]) for k in once)
    assert unpack(model.config, once).keys() == model.state_dict().keys()


def test_sizes_that_do_not_fit_are_refused():
    sizes = SHAPES["qwen3"]
    for wrong in (dict(n_embd=100), dict(n_hidden=33), dict(head_dim=2, n_head=2),
                  dict(n_hidden=1 << 40), dict(n_embd=1 << 20), dict(vocab_size=1 << 40),
                  dict(max_seq_len=1 << 40), dict(head_dim=512), dict(head_dim=8)):
        with pytest.raises(ValueError, match="8 and 4 bits"):
            quantised.shapes(replace(sizes, **wrong))
    for broken in (torch.full((32, 64), torch.nan), torch.full((32, 64), 1e9)):
        with pytest.raises(ValueError, match="not finite"):
            packed(broken, 8)


def test_a_hostile_file_makes_no_function_read_past_its_end():
    """Every size that C is told comes from the config; tensors that are smaller, of another type or
    strided are refused before it gets their place."""
    model = made(SHAPES["qwen3"])
    good = pack(model.config, model.state_dict(), 8)
    assert Quantised(model.config, good)
    for name, t in good.items():
        for bad in (t[:-1], t.double(), t[:0], t.transpose(0, -1), t.expand(2, *t.shape)):
            if bad.shape != t.shape or bad.dtype != t.dtype:
                with pytest.raises(ValueError, match=name):
                    Quantised(model.config, good | {name: bad})
    f = Quantised(model.config, good)
    for idx, cache in ((torch.zeros(1, 97, dtype=torch.long), None),
                       (torch.zeros(1, 9, dtype=torch.long), KVCache(model.config, 1, 8)),
                       (torch.zeros(1, 2, dtype=torch.long), KVCache(model.config, 2, 8)),
                       (torch.zeros(1, 1, dtype=torch.long), KVCache(
                           model.config, 1, 8, dtype=torch.bfloat16))):
        with pytest.raises(ValueError):
            f(idx, cache)
    with pytest.raises(IndexError):
        f(torch.tensor([[400]]))
    with pytest.raises(ValueError, match="a product of 96"):
        f.lm_head(torch.zeros(1, 64))


@pytest.fixture
def stored(tiny, tmp_path):
    """A function that stores the tiny model in 8 or 4 bits."""
    def store(bits):
        out = str(tmp_path / str(bits))
        convert.give_out(convert.Config(checkpoint=tiny.pt, to=f"int{bits}", out=out))
        return out
    return store


def test_a_model_stored_in_8_bits_writes_the_same(tiny, stored):
    """As one that is rounded when it is loaded; without a compiler, or for training, as one of the
    rounded weights."""
    ours = load_model(tiny.pt, CPU, torch.int8)[0]
    again = load_model(stored(8), CPU, None)[0]
    ids = torch.randint(256, (1, 50))
    assert type(again) is Quantised and torch.equal(ours(ids), again(ids))
    back = load_model(str(again.path), CPU, torch.float32)[0]
    assert type(back) is Transformer and asdict(back.config) == asdict(again.config)
    torch.testing.assert_close(back(ids), again(ids), rtol=0.1, atol=0.1)


def test_without_a_compiler_one_line_says_what_it_would_bring(tiny, stored, monkeypatch, capfd):
    monkeypatch.setenv("CC", "no-such-compiler")
    library.library.cache_clear()
    try:
        models = [load_model(where, CPU, torch.int8)[0] for where in (tiny.pt, stored(4))]
        assert [type(m) for m in models] == [Transformer] * 2
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1 and "need a C compiler" in said[0] and "no-such-compiler" in said[0]
    finally:
        library.library.cache_clear()


def test_the_program_is_kept_and_two_processes_may_make_it_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []
    threads = [threading.Thread(target=lambda: made.append(library.built())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3 and len(set(made)) == 1
    assert [path.name for path in (tmp_path / "khaosz").iterdir()] == [made[0].name]
    at = made[0].stat().st_mtime_ns
    assert library.built() == made[0] and made[0].stat().st_mtime_ns == at


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_what_a_compiler_makes_must_load_before_it_is_kept(monkeypatch, tmp_path):
    """A clang without its OpenMP library compiled, and what it made did not load, ever again."""
    (tmp_path / "cc").write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; echo no > "$2"')
    (tmp_path / "cc").chmod(0o700)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="cc: file too short|cc: .*invalid ELF"):
        library.built()
    assert list((tmp_path / "khaosz").iterdir()) == []


def test_a_damaged_program_is_made_anew(monkeypatch, tmp_path):
    """An empty one, as a power cut leaves, meant fp32 at every start."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = library.built()
    whole = made.stat().st_size
    made.unlink()  # not in place: this process may have it loaded
    made.write_bytes(b"")
    assert library.built() == made and made.stat().st_size == whole


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_a_compiler_may_fail_once_and_have_words(monkeypatch, tmp_path):
    """Killed for memory at its first try, it made a program without the processor's products,
    eleven times as slow, which was kept for good."""
    (tmp_path / "flaky").write_text(f'#!/bin/sh\n[ -e {tmp_path}/tried ] || {{ touch '
                                    f'{tmp_path}/tried; echo Killed >&2; exit 1; }}\nexec "$@"')
    (tmp_path / "flaky").chmod(0o700)
    monkeypatch.setenv("CC", f"{tmp_path}/flaky cc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = library.built()
    best = library.built()
    assert best != first and library.built() == best


def test_without_a_home_there_is_a_folder_for_this_process(monkeypatch, tmp_path):
    for name in ("XDG_CACHE_HOME", "HOME", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: 1 / 0)  # as for a user without an entry
    monkeypatch.setattr("os.path.expanduser", lambda path: f"{tmp_path}/file/.cache")
    (tmp_path / "file").touch()
    ends = library.private_folder()
    assert ends.is_dir() and ends.name.startswith("khaosz")


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_a_program_is_not_run_from_where_others_can_write(monkeypatch, tmp_path):
    """Somebody else could put theirs there: a folder of ours for this process only is used."""
    (tmp_path / "khaosz").mkdir()
    (tmp_path / "khaosz").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library.private_folder().parent != tmp_path
    (tmp_path / "khaosz").chmod(0o700)
    assert library.private_folder().parent == tmp_path


def test_c_and_torch_share_their_threads():
    """Two pools would fight for the processors. cc links the libgomp that torch has loaded."""
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert library.library().omp_get_max_threads() == n
    finally:
        torch.set_num_threads(before)
