"""convert.py: models of transformers' own classes come in, give the same logits, ids and chats, and
go out again to the last bit."""
import json
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_tokenizer import TEXT, random_text

import convert
import train_sft
from model import KVCache, ModelConfig, Transformer
from plumbing import checkpoint, runtime
from plumbing.loading import load_model
from plumbing.vocabulary import PATTERNS
from tokenizer import HAN_PATTERN, Tokenizer, count_pieces, dump, render, train_bpe

pytest.importorskip("transformers", reason="the models come from its classes")

CPU = torch.device("cpu")
ALONE = runtime.Dist(0, 1, CPU, torch.float32)
ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
ASKED = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
# templates as the families have them: a message of the system that nobody gave; thoughts, which are
# empty in a last reply; a first token, a system that always says something, trimmed messages
TEMPLATES = {
    "qwen2": "{% if messages[0].role != 'system' %}"
             "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
             "{% for m in messages %}" + TURN + ASKED + "{% endif %}",
    "qwen3": "{% set empty = '<think>\\n\\n</think>\\n\\n' %}{% for m in messages %}"
             "{% if loop.last and m.role == 'assistant' %}"
             "{{ '<|im_start|>assistant\\n' + empty + m.content + '<|im_end|>\\n' }}{% else %}"
             + TURN + "{% endif %}" + ASKED +
             "{% if enable_thinking is false %}{{ empty }}{% endif %}{% endif %}",
    "llama": "{% set head = '<|start_header_id|>system<|end_header_id|>\\n\\nIt is May.\\n\\n' %}"
             "{{ bos_token + head }}{% if messages[0].role == 'system' %}"
             "{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}"
             "{{ '<|eot_id|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
             "'<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
             "{% if add_generation_prompt %}"
             "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"}
NAMES = {"qwen2": "qwen2", "qwen3": "qwen2", "llama": "llama-bpe"}  # of their patterns
SPECIAL = {"qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
           "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                     "<|end_header_id|>", "<|eot_id|>"]}
SPECIAL["qwen3"] = [*SPECIAL["qwen2"], "<think>", "</think>"]


def their_tokenizer(family: str, bytes_known: int = 256):
    """A tokenizer that the tokenizers package trains, as an object of transformers."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    cut = tokenizers.pre_tokenizers
    made.pre_tokenizer = cut.Sequence([
        cut.Split(tokenizers.Regex(PATTERNS[NAMES[family]]), "isolated"),
        cut.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(cut.ByteLevel.alphabet())[:bytes_known]))
    if family != "llama":
        made.normalizer = tokenizers.normalizers.NFC()
    made.add_tokens([tokenizers.AddedToken(name, special="think" not in name, normalized=False)
                     for name in SPECIAL[family]])
    first, end = SPECIAL[family][0], SPECIAL[family][4 if family == "llama" else 2]
    if family == "llama":
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A $B",
            special_tokens=[(first, made.token_to_id(first))])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=first if family == "llama" else None, eos_token=end,
        pad_token=first, chat_template=TEMPLATES[family])


def their_model(family: str, tied: bool):
    """A model of transformers with random weights; its embedding has spare rows, as Qwen's has."""
    transformers = pytest.importorskip("transformers")
    kind = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[family]
    rope = ROPE if family == "llama" else {"rope_type": "default", "rope_theta": 1e4}
    more = {"head_dim": 32} if family == "qwen3" else {}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{
        "vocab_size": 420, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": tied, "rms_norm_eps": 1e-5, "rope_parameters": rope, **more}))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes the Hugging Face folder of a family, in several files."""
    made: dict = {}

    def make(family: str, tied: bool = True) -> Path:
        if (family, tied) not in made:
            where = made[family, tied] = tmp_path_factory.mktemp(family)
            their_model(family, tied).save_pretrained(where, max_shard_size="150KB")
            their_tokenizer(family).save_pretrained(where)
            assert len(list(where.glob("*.safetensors"))) > 1
        return made[family, tied]
    return make


def take(source, out) -> Path:
    convert.take_in(convert.Config(input=str(source), out_dir=str(out)))
    return checkpoint.list_checkpoints(str(out))[0]


def give(source, to: str, out, dtype: str = "auto") -> None:
    convert.give_out(convert.Config(checkpoint=str(source), to=to, out=str(out), dtype=dtype))


def conversations(n: int) -> list[list[dict]]:
    r = random.Random(7)
    return [[{"role": "system", "content": random_text(r, 9)}] * r.randint(0, 1) + [
        {"role": ("user", "assistant")[i % 2],
         "content": "x" + random_text(r, r.randint(1, 30)) + r.choice(["", "\n", "  "])}
        for i in range(r.randint(1, 5))] for _ in range(n)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_a_model_comes_in_as_it_is_and_goes_out_to_the_last_bit(family, tied, folder, tmp_path,
                                                                capsys):
    """Logits of transformers, with a cache or without; ids and chats of its tokenizer; what is
    exported opens there, too, and comes back as the same file: its name has its hash."""
    pytest.importorskip("gguf")
    import transformers
    source = folder(family, tied)
    name = take(source, tmp_path / "in").name
    assert " parameters in float32, " in capsys.readouterr().out
    model, tok = load_model(str(tmp_path / "in"), CPU, torch.float32)
    ids = torch.randint(400, (2, 90), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config, 2, 90)
    give(tmp_path / "in", "hf", tmp_path / "hf")
    give(tmp_path / "in", "gguf", tmp_path / "x.gguf", "float32")
    for place in (source, tmp_path / "hf"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        words = transformers.AutoTokenizer.from_pretrained(place)
        with torch.no_grad():
            torch.testing.assert_close(model(ids), theirs.eval()(ids).logits, atol=1e-5, rtol=1e-5)
        r = random.Random(3)
        for text in [TEXT, *(random_text(r, 30) for _ in range(100))]:
            assert tok.encode_ordinary(text) == words(text, add_special_tokens=False).input_ids
            assert [*tok.begin, *tok.encode_ordinary(text)] == words(text).input_ids
        for chat in conversations(200):
            asks = chat[-1]["role"] != "assistant"
            for think in (True, False):
                assert render(tok, chat, asks, think)[0] == words.apply_chat_template(
                    chat, add_generation_prompt=asks, enable_thinking=think, return_dict=False)
    with torch.no_grad():
        parts = torch.cat([model(part, cache) for part in ids.split([40, 1, 1, 48], dim=1)], dim=1)
        torch.testing.assert_close(parts, model(ids), atol=1e-5, rtol=1e-5)
    assert take(tmp_path / "hf", tmp_path / "again").name == name
    assert take(tmp_path / "x.gguf", tmp_path / "and again").name == name


def test_what_a_chat_says_stays_text_and_only_replies_are_learnt(folder, tmp_path):
    """In every template: no special id from a message; the mask covers the replies and their ends;
    a prompt is the beginning of the chat that goes on with a reply."""
    for family in TEMPLATES:
        take(folder(family), tmp_path / family)
        tok = load_model(str(tmp_path / family), CPU, torch.float32)[1]
        special = set(tok._special_tokens.values())
        assert tok.stop[0] == tok.im_end and tok.endoftext in tok.stop
        bare = [i for i in render(tok, [{"role": "user", "content": "x"}], True)[0] if i in special]
        for evil in SPECIAL[family]:
            ids, mask = render(tok, [{"role": "user", "content": f"a{evil}b"}], True)
            assert [i for i in ids if i in special] == bare and f"a{evil}b" in tok.decode(ids)
            assert len(mask) == len(ids) and not any(mask)
        chat = [{"role": role, "content": said} for role, said in (
            ("user", "Who?"), ("assistant", "A cat."), ("user", "那只？"), ("assistant", "猫"))]
        ids, mask = render(tok, chat)
        assert tok.decode([i for i, learn in zip(ids, mask) if learn]) == "".join(
            said + tok.decode([tok.im_end]) for said in ("A cat.", "猫"))
        prompt = render(tok, chat[:3], True)[0]
        assert ids[:len(prompt)] == prompt


def test_llama_without_a_template_speaks_as_llamas_do(folder, tmp_path):
    """A base model has the tokens for turns and no template; its stage is then pt."""
    base = shutil.copytree(folder("llama"), tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    take(base, tmp_path / "in")
    model, tok = load_model(str(tmp_path / "in"), CPU, torch.float32)
    said = tok.decode(render(tok, [{"role": "user", "content": "hi"}])[0])
    assert model.kind == "pt" and said == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>")


def test_a_vocabulary_that_lacks_bytes_still_gives_back_any_text(tmp_path):
    """SmolLM2's lacks 21 of the 256, and transformers drops what needs them without a word."""
    their_model("qwen2", True).save_pretrained(tmp_path / "hf")
    their_tokenizer("qwen2", bytes_known=230).save_pretrained(tmp_path / "hf")
    take(tmp_path / "hf", tmp_path / "in")
    model, tok = load_model(str(tmp_path / "in"), CPU, torch.float32)
    assert 420 < tok.n_vocab == model.config.vocab_size == len(model.embed_tokens.weight)
    for text in (TEXT, "".join(map(chr, range(0x80, 0x250))), "\x00\x7f"):
        assert tok.decode(tok.encode_ordinary(text)) == text


def test_a_tuned_model_goes_out_as_one_of_its_family(folder, tiny, tmp_path):
    """SFT from an imported checkpoint, which has no optimizer, in all weights and by LoRA."""
    import transformers
    take(folder("qwen2"), tmp_path / "in")
    for rank in (0, 4):
        out = tmp_path / f"sft{rank}"
        train_sft.train(replace(
            train_sft.Config(init_from=str(tmp_path / "in"), data=tiny.chat, out_dir=str(out)),
            max_steps=2, warmup_steps=1, eval_every=2, save_every=2, log_every=1, max_len=256,
            batch_tokens=1024, batch_size=2, eval_answers=1, answer_tokens=4, val_fraction=0.2,
            lora_rank=rank), ALONE)
        give(out, "hf", tmp_path / f"hf{rank}")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"hf{rank}").eval()
        model, _ = load_model(str(out), CPU, torch.float32)
        with torch.no_grad():
            ids = torch.arange(50)[None]
            torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
        assert type(theirs).__name__ == "Qwen2ForCausalLM" and theirs.config.vocab_size == 420


@pytest.mark.parametrize("pattern", [HAN_PATTERN, PATTERNS["qwen2"]], ids=["old", "qwen2"])
def test_a_model_of_ours_opens_there_with_the_same_ids(pattern, tmp_path):
    """Pre-trained here: byte-level BPE of ours, ChatML, the sizes of a Qwen3."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    tok = Tokenizer(dump(train_bpe(count_pieces([TEXT], pattern), 400), pattern))
    config = ModelConfig(tok.n_vocab, 2, 4, 2, 64, 16, 96, 128)
    saved = checkpoint.save(str(tmp_path / "ours"), 0, {
        "format": 1, "kind": "sft", "step": 0, "model": Transformer(config).state_dict(),
        "optimizer": [], "model_config": asdict(config), "config": {}, "tokenizer": tok.text})
    give(saved, "hf", tmp_path / "hf")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    r = random.Random(5)
    for text in [TEXT, *(random_text(r, 40) for _ in range(300))]:
        assert words(text, add_special_tokens=False).input_ids == tok.encode_ordinary(text)
    chat = conversations(20)[3]
    assert words.apply_chat_template(chat, return_dict=False) == render(tok, chat)[0]
    again = checkpoint.load(str(take(tmp_path / "hf", tmp_path / "again")))[0]
    assert again["tokenizer"] == tok.text and again["kind"] == "sft"
    if pattern == HAN_PATTERN:
        with pytest.raises(ValueError, match="llama.cpp has no name for"):
            give(saved, "gguf", tmp_path / "x.gguf")
    else:
        give(saved, "gguf", tmp_path / "x.gguf", "q8_0")
        state = checkpoint.load(str(take(tmp_path / "x.gguf", tmp_path / "and again")))[0]
        assert state["tokenizer"] == tok.text and all(
            (state["model"][name].float() - t).abs().max() <= t.abs().max() / 100
            for name, t in checkpoint.load(str(saved))[0]["model"].items())


@pytest.mark.parametrize("change, missing", [
    ({"architectures": ["GPT2LMHeadModel"]}, "the architecture GPT2LMHeadModel"),
    ({"num_experts": 8}, "a mixture of experts"),
    ({"use_sliding_window": True, "sliding_window": 64}, "a sliding window"),
    ({"layer_types": ["sliding_attention"]}, "a sliding window"),
    ({"final_logit_softcapping": 30.0}, "soft caps"),
    ({"quantization_config": {"bits": 4}}, "quantised weights of this kind"),
    ({"hidden_act": "gelu"}, "the activation gelu"),
    ({"attention_bias": True}, "biases"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "positions of the type yarn"),
    ({"partial_rotary_factor": 0.5}, "heads that are rotated in part")])
def test_what_is_missing_here_is_named_before_anything_is_read(change, missing, folder, tmp_path,
                                                              monkeypatch, capsys):
    where = tmp_path / "hf"
    where.mkdir()
    found = json.loads((folder("qwen2") / "config.json").read_text()) | change
    (where / "config.json").write_text(json.dumps(found))  # and nothing else
    monkeypatch.setattr("sys.argv", ["convert.py", f"--input={where}", f"--out_dir={tmp_path}/out"])
    with pytest.raises(SystemExit) as stop:
        convert.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error == (
        f"{where}: needs what model.py does not have: {missing}\n")
