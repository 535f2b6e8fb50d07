"""TeleChat as a user has it: bundles of three variants, one of which thinks, and text of every generation."""

import pytest
import torch
from safetensors.torch import load_file

from moemerge.bundle.export import export_variant
from moemerge.bundle.verify import verify_bundle
from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.errors import MoemergeError, NotFound
from moemerge.evaluation.loading import load_model
from moemerge.refs import FolderRef
from moemerge.runner.request import Request
from moemerge.text.variants import VariantText
from tests.bundles import open_engine, run
from tests.factories import edit_json, write_checkpoint
from tests.parity.telechat_reference import TelechatReference
from tests.telechat import CODE, SECOND, SEVENTH, TWELFTH
from tests.thinking import make_thinking

LONG, ANSWERED = 32768, 24


@pytest.fixture(scope="module", params=["telechat", "telechat_moe"])
def trio(request, tmp_path_factory):
    """As TeleChat2, TeleChat2.5 and T1 of one size: own vocabularies, one thinks, code beside the weights."""
    folder = tmp_path_factory.mktemp(request.param)
    options = {"settings": SECOND, "dtype": "BF16", "config": {"auto_map": CODE}}
    base = write_checkpoint(folder / "chat2", request.param, **options)
    write_checkpoint(folder / "chat25", base=base, noise=0.1, seed=1, vocab=66, config=options["config"])
    make_thinking(
        write_checkpoint(folder / "t1", base=base, noise=0.1, seed=2, vocab=96, config=options["config"])
    )
    for name in ("chat2", "chat25", "t1"):
        code = f"open({str(folder / 'was_run')!r}, 'w')\nraise SystemExit\n"
        (folder / name / "modeling_telechat.py").write_text(code)
    return folder


def consolidate(folder, target, budget):
    names = ("chat2", "chat25", "t1")
    variants = open_variants({name: FolderRef(folder / name) for name in names})
    merge(variants, target, options_of(budget, "measured" if budget != "exact" else None))
    return verify_bundle(target)


def test_exact_bundle_of_three_gives_every_byte_back(trio, tmp_path):
    bundle = consolidate(trio, tmp_path / "x.moe", "exact")
    for name in ("chat2", "chat25", "t1"):
        export_variant(bundle, name, tmp_path / name)
        before, after = (load_file(path / name / "model.safetensors") for path in (trio, tmp_path))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert tensor.dtype == after[key].dtype
            assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8))
    assert not (trio / "was_run").exists()


@pytest.mark.parametrize("budget", ["1x", "1.25x"])
def test_bundle_of_three_serves_mixed_batches_as_its_exports(budget, trio, tmp_path):
    bundle = consolidate(trio, tmp_path / "x.moe", budget)
    assert bundle.manifest.bytes_ratio <= float(budget[:-1]) + 1e-3
    engine = open_engine(bundle, dtype="float32", max_step_tokens=8)
    texts = {name: VariantText(bundle, name) for name in bundle.manifest.variants}
    requests = [
        Request(
            request_id=name,
            variant=name,
            prompt_ids=text.encode_chat([{"role": "user", "content": "why?"}]),
            max_tokens=5,
        )
        for name, text in texts.items()
    ]
    engine.preload()
    answers = run(engine, *requests)
    assert engine.snapshot().steps.mixed > 0
    engine.close()
    for request, answer in zip(requests, answers, strict=True):
        export_variant(bundle, request.variant, tmp_path / request.variant)
        model = TelechatReference(tmp_path / request.variant)
        tokens = list(request.prompt_ids)
        for token in answer.tokens:
            likeliest = model.logits(tokens)[-1]
            assert likeliest[token] >= likeliest.max() - 1e-3
            tokens.append(token)


def test_longest_context_is_the_trained_length(tmp_path):
    settings = {**SECOND, "rope_trained_length": 32, "max_positions": 32}
    folder = write_checkpoint(tmp_path / "a", "telechat", settings=settings)
    merge(open_variants({"a": FolderRef(folder)}), tmp_path / "x.moe", options_of("exact"))
    engine = open_engine(tmp_path / "x.moe", dtype="float32")
    assert engine.limits_of("a").context_tokens == 32
    (answer,) = run(engine, Request(request_id="a", variant="a", prompt_ids=(5,) * 30, max_tokens=2))
    assert len(answer.tokens) == 2
    with pytest.raises(MoemergeError):
        engine.submit(Request(request_id="b", variant="a", prompt_ids=(5,) * 32, max_tokens=2))
    engine.close()


def test_answer_to_the_end_of_a_long_context_stays_in_its_cache(tmp_path):
    """32k tokens at a width of eight, in pieces: as in one pass, and in the memory that was given."""
    tiny = {"hidden_size": 8, "expert_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}
    long = {"rope_trained_length": LONG, "max_positions": LONG, "rope_base_length": 8192}
    options = {"settings": {**SECOND, **tiny, **long}, "dtype": "F32"}
    folder = write_checkpoint(tmp_path / "a", "telechat", **options)
    merge(open_variants({"a": FolderRef(folder)}), tmp_path / "x.moe", options_of("exact"))
    cache_bytes = 2 * 4 * 8 * LONG
    engine = open_engine(
        tmp_path / "x.moe", dtype="float32", cache_memory=cache_bytes, block_tokens=256, max_step_tokens=512
    )
    prompt = tuple(3 + token * token % 61 for token in range(LONG - ANSWERED))
    (answer,) = run(engine, Request(request_id="a", variant="a", prompt_ids=prompt, max_tokens=ANSWERED))
    assert (len(answer.tokens), answer.finish) == (ANSWERED, "length")
    assert engine.snapshot().blocks_total * 256 * 2 * 4 * 8 <= cache_bytes
    engine.close()
    whole = torch.tensor([[*prompt, *answer.tokens[:-1]]])
    logits = load_model(open_checkpoint(LocalFolder(folder))).forward(whole)[0, -ANSWERED:]
    chosen = logits.gather(1, torch.tensor(answer.tokens).unsqueeze(1)).squeeze(1)
    assert (logits.amax(dim=1) - chosen).max() < 1e-3


FIRST_GENERATION = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<_user>' + message['content'] + '<_bot>' }}"
    "{% else %}{{ message['content'] + '<_end>' }}{% endif %}{% endfor %}"
)
SECOND_GENERATION = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = 'I am TeleChat.' %}{% set rest = messages %}"
    "{% endif %}{{ '<_system>' + system + '\n' }}{% for message in rest %}"
    "{% if message['role'] == 'user' %}{{ '<_user>' + message['content'] }}"
    "{% elif message['role'] in ('assistant', 'bot') %}{{ '<_bot>' + message['content'] + '<_end>\n' }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<_bot>' }}{% endif %}"
)
T1 = SECOND_GENERATION.replace("{{ '<_bot>' }}", "{{ '<_bot><think>\n' }}").replace(
    "'<_bot>' + message['content']", "'<_bot>' + message['content'].split('</think>')[-1]"
)
TURNS = [
    {"role": "user", "content": "one"},
    {"role": "bot", "content": "hm</think>two"},
    {"role": "user", "content": "three"},
]


@pytest.mark.parametrize(
    ("template", "text", "thinks"),
    [
        (FIRST_GENERATION, "<_user>one<_bot>hm</think>two<_end><_user>three<_bot>", False),
        (
            SECOND_GENERATION,
            "<_system>I am TeleChat.\n<_user>one<_bot>hm</think>two<_end>\n<_user>three<_bot>",
            False,
        ),
        (T1, "<_system>I am TeleChat.\n<_user>one<_bot>two<_end>\n<_user>three<_bot><think>\n", True),
    ],
)
def test_templates_of_each_generation_render_in_the_sandbox(template, text, thinks, tmp_path):
    folder = write_checkpoint(tmp_path / "a", "telechat", settings=SECOND)
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    merge(open_variants({"a": FolderRef(folder)}), tmp_path / "x.moe", options_of("exact"))
    variant = VariantText(verify_bundle(tmp_path / "x.moe"), "a")
    assert variant.render_chat(TURNS) == text
    parts = variant.reasoning(variant.encode_chat(TURNS)).split("hm</think>two")
    assert parts == (("hm", "two") if thinks else ("", "hm</think>two"))


def test_generation_config_tells_the_end_where_the_config_contradicts_it(tmp_path):
    folder = write_checkpoint(tmp_path / "a", "telechat", settings=SEVENTH, vocab=70)
    edit_json(folder / "config.json", eos_token_id=1)
    edit_json(folder / "generation_config.json", eos_token_id=65, do_sample=False, repetition_penalty=1.03)
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    merge(open_variants({"a": FolderRef(folder)}), tmp_path / "x.moe", options_of("exact"))
    variant = VariantText(verify_bundle(tmp_path / "x.moe"), "a")
    assert variant.stop_ids == {65}
    assert (variant.recommended().temperature, variant.recommended().repetition_penalty) == (0.0, 1.03)


def test_sentencepiece_alone_says_what_to_do(tmp_path):
    folder = write_checkpoint(tmp_path / "a", "telechat", settings=TWELFTH)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    merge(open_variants({"a": FolderRef(folder)}), tmp_path / "x.moe", options_of("exact"))
    with pytest.raises(
        NotFound, match=r"SentencePiece model \(tokenizer.model\).*no tokenizer.json. Convert it"
    ):
        VariantText(verify_bundle(tmp_path / "x.moe"), "a").encode("a")
