"""The accuracy lab: simulated ranks are real ranks, numbers are what they say, a stopped run goes on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from ranks import spawn
from specification import planned
from torch import Tensor

from flashcomm_megatron.collectives import all_reduce
from flashcomm_megatron.collectives.algorithms import Residuals
from flashcomm_megatron.config import Config
from flashcomm_megatron.tools import accuracy
from flashcomm_megatron.tools.accuracy import sweep
from flashcomm_megatron.tools.accuracy.baselines import BASELINES
from flashcomm_megatron.tools.accuracy.llama import Llama, windows
from flashcomm_megatron.tools.accuracy.ranks import Compressed, exact, payload_bytes
from flashcomm_megatron.tools.accuracy.score import Bench, Method, Tally

save_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

DATA = Path(os.environ.get("FLASHCOMM_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
HIDDEN, INNER, VOCABULARY, LAYERS, CONTEXT = 64, 96, 50, 3, 48
CONFIG = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
    "max_position_embeddings": CONTEXT, "bos_token_id": 1, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, and a text whose every word is a token."""
    path = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    weights = {"model.embed_tokens.weight": 2 * random(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{name}.{norm}.weight"] = torch.ones(HIDDEN)
        for each, out in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2), ("o", HIDDEN)):
            weights[f"{name}.self_attn.{each}_proj.weight"] = random(out, HIDDEN)
        weights[f"{name}.mlp.gate_proj.weight"] = random(INNER, HIDDEN)
        weights[f"{name}.mlp.up_proj.weight"] = random(INNER, HIDDEN)
        weights[f"{name}.mlp.down_proj.weight"] = random(HIDDEN, INNER)
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    picks = torch.randint(2, VOCABULARY, (400,), generator=generator).tolist()
    (path / "text.txt").write_text(" ".join(f"w{i}" for i in picks))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Llama:
    return Llama(str(folder))


def tokens(rows: int = 2, length: int = 20) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def arguments(folder: Path, *more: str) -> list[str]:
    paths = ["--model", str(folder), "--text", str(folder / "text.txt"), "--out", str(folder / "out")]
    sizes = ["--sequences", "4", "--length", "24", "--prompts", "2", "--generate", "6"]
    return [*paths, *sizes, *more]


# ---- simulated ranks ---------------------------------------------------------------------------------------------


def _real(rank: int, world: int, folder: str, config: Config) -> Tensor:
    """Logits of a rank that holds its own partial sums only and adds them up with its peers, with feedback."""
    memory = Residuals()

    def add(site: str, parts: list[Tensor]) -> Tensor:
        return all_reduce(parts[rank].contiguous(), None, config, residuals=memory)

    with torch.no_grad():
        return Llama(folder)(tokens(), world, add)


@pytest.mark.parametrize("world", [2, 4])
def test_the_simulation_is_the_real_run_bit_for_bit(folder: Path, model: Llama, world: int) -> None:
    config = Config(bits=4, min_bytes=0)
    simulated = model(tokens(), world, Compressed(config, world, {}))
    assert not torch.equal(simulated, model(tokens(), world, exact))
    for logits in spawn(_real, world, str(folder), config):
        assert torch.equal(logits, simulated)


def test_without_compression_ranks_change_nothing_but_the_order_of_additions(model: Llama) -> None:
    for world in (2, 4):
        assert torch.allclose(model(tokens(), world, exact), model(tokens(), 1, exact), atol=1e-4)


def test_a_cache_continues_a_text_as_the_whole_does(model: Llama) -> None:
    whole, cache = model(tokens(), 1, exact), {}
    pieces = [model(part, 1, exact, cache) for part in (tokens()[:, :7], tokens()[:, 7:8], tokens()[:, 8:9])]
    assert torch.allclose(torch.cat(pieces, 1), whole[:, :9], atol=1e-4)


def test_bits_are_those_of_the_payloads(model: Llama) -> None:
    for config, world in ((Config(bits=4, min_bytes=0), 2), (Config(bits=6, recipe="flash-v1", min_bytes=0), 4)):
        ranks = Compressed(config, world, {})
        model(tokens(), world, ranks)
        numel = tokens().numel() * HIDDEN
        legs = config.legs
        lengths = [numel] if world == 2 else [numel // world] * world
        per_leg = [sum(leg.wire_bytes(n, HIDDEN) for n in lengths) for leg in legs][: 1 if world == 2 else 2]
        assert ranks.bits_per_value == pytest.approx(8 * sum(per_leg) / len(per_leg) / numel)


def test_the_last_sum_has_the_width_that_megatron_gives_it(model: Llama) -> None:
    config = Config(bits=4, min_bytes=0, last_bits=8)
    plain = Compressed(config, 4, {}, has_feedback=False)
    ranks = Compressed(config, 4, {}, has_feedback=False, layers=LAYERS)
    for each in (plain, ranks):
        model(tokens(), 4, each)
    assert config.last_sum(LAYERS) == 8
    last = f"layers.{LAYERS - 1}.mlp.down_proj"
    assert ranks.lost[last] < 0.03 * plain.lost[last]
    assert all(ranks.lost[site] == plain.lost[site] for site in plain.lost if site != last)
    assert ranks.bits_per_value > plain.bits_per_value + 3 / (2 * LAYERS)


def test_payloads_of_any_length_are_counted() -> None:
    plan = planned("all_reduce", torch.empty(1000), 3, Config(bits=4, recipe="flash-v1", min_bytes=0))
    sizes = (384, 384, 232)  # thirds, rounded up to blocks
    assert payload_bytes(plan) == sum(plan.reduce.wire_bytes(n) for n in sizes)


def test_equal_bits_are_equal_bytes_sent() -> None:
    """Against the bytes that collectives count: (world - 1) / world of the tensor on each of two legs."""
    for name in ("one-step", "two-step"):
        config = Config(bits=4, recipe="flash-v1", min_bytes=0, algorithm=name)
        for world in (2, 4, 8):
            plan = planned("all_reduce", torch.empty(8192), world, config)
            assert plan.wire_bytes == 2 * (world - 1) / world * payload_bytes(plan)


# ---- scores ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(folder: Path, model: Llama) -> Bench:
    return Bench(model, windows(str(folder), str(folder / "text.txt"), model, 24, 4), 2, 8, 12)


def test_one_rank_loses_nothing(bench: Bench) -> None:
    score = bench.score(Config(bits=2, min_bytes=0), 1, with_sites=True)
    assert score.rise == 0 and score.kl == 0 and score.agreement == 1 and score.wire_bits == 0
    assert score.diverged_after == 12 and set(score.agreement_by_quarter) == {1.0}


def test_scores_are_those_of_their_definitions(bench: Bench, model: Llama) -> None:
    score = bench.score(Config(bits=3, min_bytes=0), 2, with_sites=True)
    reference = model(bench.windows, 1, exact)[:, :-1].log_softmax(-1)
    found = model(bench.windows, 2, Compressed(Config(bits=3, min_bytes=0), 2, {}))[:, :-1].log_softmax(-1)
    labels = bench.windows[:, 1:, None]
    perplexity, wanted = (math.exp(-each.gather(-1, labels).mean().item()) for each in (found, reference))
    assert score.perplexity == pytest.approx(perplexity, rel=1e-6)
    assert score.rise == pytest.approx(perplexity / wanted - 1, abs=1e-6)
    divergence = torch.nn.functional.kl_div(found, reference, log_target=True, reduction="sum")
    assert score.kl == pytest.approx(divergence.item() / labels.numel(), rel=1e-4)
    assert score.agreement == (found.argmax(-1) == reference.argmax(-1)).double().mean().item()
    assert list(score.decibels) == list(score.rise_by_site) == model.sites


def test_generation_diverges_where_the_text_does(bench: Bench, model: Llama) -> None:
    """Following the exact path tells how long free generation would have been on it."""
    config = Config(bits=2, recipe="flash-v2", min_bytes=0)
    ranks, cache, out = Compressed(config, 2, {}), {}, []
    step = bench.prompts
    for _ in range(12):
        ranks.begin()
        step = model(step, 2, ranks, cache)[:, -1:].argmax(-1)
        out.append(step)
    same = (torch.cat(out, 1) == bench.continuation).long().cumprod(1).sum(1).float().mean().item()
    assert same < 12, "two bits change this text"
    assert bench.score(config, 2, with_sites=False).diverged_after == same


def test_wider_formats_are_closer(bench: Bench) -> None:
    for recipe in ("auto", "flash-v1", "flash-v2", "mx-int"):
        losses = [bench.score(Config(bits=bits, recipe=recipe, min_bytes=0), 2, False).kl for bits in (4, 8)]
        assert losses[1] < 0.2 * losses[0], recipe


def test_windows_are_streamed_and_the_exact_model_reads_each_once(
    folder: Path, model: Llama, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One window at a time: the same scores as all at once, and one exact forward a window for two methods."""
    read: list[tuple[int, int]] = []
    forward = Llama.__call__

    def counted(self: Llama, batch: Tensor, world: int, *more: object) -> Tensor:
        read.append((world, len(batch)))
        return forward(self, batch, world, *more)  # type: ignore[arg-type]

    streamed = Bench(model, bench.windows, 2, 8, 0)
    streamed.batch = 1
    monkeypatch.setattr(Llama, "__call__", counted)
    configs = [Config(bits=bits, recipe="flash-v1", min_bytes=0) for bits in (8, 4)]
    todo = [(Method("flash-v1", config, 2), Tally()) for config in configs]
    assert streamed.steps(todo, with_sites=False) == 3 * 4 == sum(streamed.run(todo, with_sites=False))
    assert read == [(1, 1), (2, 1), (2, 1)] * 4
    for method, tally in todo:
        found, whole = streamed.finish(method, tally), bench.score(method.config, 2, False)
        assert found.rise == pytest.approx(whole.rise, rel=1e-5) and found.kl == pytest.approx(whole.kl, rel=1e-4)


def test_errors_are_those_of_the_windows(bench: Bench, model: Llama) -> None:
    """The standard error of the rise, from losses computed here; none for one window."""
    config = Config(bits=3, min_bytes=0)
    losses = []
    for add, world in ((exact, 1), (Compressed(config, 2, {}), 2)):
        logits = model(bench.windows, world, add)[:, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), bench.windows[:, 1:], reduction="none"))
    excess = (losses[1] - losses[0]).mean(1)
    score = bench.score(config, 2, False)
    error = math.exp(excess.mean().item()) * excess.std().item() / len(excess) ** 0.5
    assert score.rise_error == pytest.approx(error, rel=1e-3)
    perplexity, its_error = bench.exact_perplexity
    assert perplexity == pytest.approx(losses[0].mean().exp().item(), rel=1e-5)
    assert its_error == pytest.approx(perplexity * losses[0].mean(1).std().item() / len(excess) ** 0.5, rel=1e-3)
    alone = Bench(model, bench.windows[:1], 1, 8, 0).score(config, 2, False)
    assert alone.rise_error is None and alone.kl_error is None


def test_a_stopped_run_goes_on_within_a_method(folder: Path, model: Llama, bench: Bench, tmp_path: Path) -> None:
    """Stopped after two of four windows, it reads the other two only, and ends with the same score."""
    wanted = sweep.methods(["auto"], [4], [2], [None], "auto")
    results, stopped = sweep.Results(str(tmp_path), {}), Bench(model, bench.windows, 2, 8, 0)
    stopped.batch = 1
    results.tallies |= {"exact": stopped.exact, wanted[0].key: (tally := Tally())}
    run = stopped.run([(wanted[0], tally)], False)
    for _ in range(4):  # exact, method, exact, method
        next(run)
    results.save()
    again, resumed = sweep.Results(str(tmp_path), {}), Bench(model, bench.windows, 2, 8, 0)
    resumed.batch = 1
    assert len(again.tallies[wanted[0].key].loss) == 2
    resumed.exact = again.tallies["exact"]
    assert resumed.steps([(wanted[0], again.tallies[wanted[0].key])], False) == 4
    sweep.run(wanted, again, resumed, False)
    found, whole = again.scores[wanted[0].key], bench.score(wanted[0].config, 2, False)
    assert found.kl == pytest.approx(whole.kl, rel=1e-3) and found.rise == pytest.approx(whole.rise, abs=1e-5)


# ---- baselines ---------------------------------------------------------------------------------------------------


def test_baselines_are_scored(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--out", str(tmp_path), "--recipe", "quickreduce,fp8", "--tp", "2", "--generate", "0"]
    assert accuracy.main([*arguments(folder), *more]) == 0
    scores = json.loads((tmp_path / "accuracy.json").read_text())["scores"]
    assert list(scores) == ["quickreduce 6-bit TP2", "quickreduce 4-bit TP2", "fp8 8-bit TP2"]
    bits = [round(each["wire_bits"], 1) for each in scores.values()]
    assert bits == [6.5, 4.5, 8.5], "fp8's blocks of 128 end at the row's end, after 64 values"
    six, four, float8 = (each["kl"] for each in scores.values())
    assert 0 < six < four / 5 and 0 < float8 < four / 5


# ---- checkpoints as they come -----------------------------------------------------------------------------------


def variant(folder: Path, to: Path, **config: object) -> Path:
    """The checkpoint with another config.json."""
    for name in ("model.safetensors", "tokenizer.json", "text.txt"):
        (to / name).symlink_to(folder / name)
    (to / "config.json").write_text(json.dumps(CONFIG | config))
    return to


def test_a_declared_context_sizes_nothing(folder: Path, model: Llama, tmp_path: Path) -> None:
    long = Llama(str(variant(folder, tmp_path, max_position_embeddings=131072)))
    assert torch.equal(long(tokens(), 1, exact), model(tokens(), 1, exact))
    assert len(long.rotations[0]) < 100


def test_a_model_without_bos_reads_text_alone(folder: Path, tmp_path: Path) -> None:
    alone = variant(folder, tmp_path, bos_token_id=None)
    assert windows(str(alone), str(alone / "text.txt"), Llama(str(alone)), 4, 2).shape == (2, 4)
    with_bos = windows(str(folder), str(folder / "text.txt"), Llama(str(folder)), 4, 2)
    without = windows(str(alone), str(alone / "text.txt"), Llama(str(alone)), 4, 2)
    assert without.flatten()[:3].tolist() == with_bos[0, 1:].tolist()
    assert accuracy.main([*arguments(alone), "--tp", "2", "--bits", "4", "--recipe", "auto"]) == 0


def test_sizes_that_the_heads_allow_are_the_default(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Llama(str(folder)).rank_counts == [1, 2]
    assert accuracy._worlds(None, Llama(str(folder))) == [1, 2]


# ---- the command -------------------------------------------------------------------------------------------------


def test_the_command_writes_and_resumes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--tp", "1,2", "--bits", "4,3", "--recipe"]
    assert accuracy.main(arguments(folder, *few, "auto,flash-v1,outlier")) == 0
    lines = (folder / "out" / "accuracy.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * (2 + 1 + 1)  # auto has both widths, the others 4 alone
    assert lines[0].startswith("recipe,bits,tp,block,wire_bits,perplexity,rise")
    assert "flash-v1" in capsys.readouterr().out

    scored: list[str] = []
    finish = Bench.finish
    monkeypatch.setattr(
        Bench, "finish", lambda self, method, t: scored.append(method.recipe) or finish(self, method, t)
    )
    assert accuracy.main(arguments(folder, *few, "auto,flash-v1,outlier,mx")) == 0
    assert set(scored) == {"mx"}, "what was scored is not scored again"
    assert "exact: perplexity" in capsys.readouterr().out

    assert accuracy.main([*arguments(folder, *few, "auto"), "--length", "30"]) == 2
    assert "was made with other length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--recipe", "best"], "choose all or some of auto"),
        (["--tp", "4"], "--tp 4: 4 attention heads, 2 key/value heads and 96 MLP features cannot all be shared by 4"),
        (["--tp", "4"], "Choose from 1, 2."),
        (["--length", "60"], "must fit the model's context of 48"),
        (["--sequences", "99"], "99 wanted; lower --sequences"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    assert accuracy.main([*arguments(folder), "--out", str(tmp_path), *more]) == 2
    assert sentence in capsys.readouterr().err


def test_another_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    with pytest.raises(ValueError, match="expected a plain LLaMA, found model_type mamba"):
        Llama(str(tmp_path))


def test_documents_give_their_beginnings(folder: Path, model: Llama, tmp_path: Path) -> None:
    text = tmp_path / "documents.txt"
    text.write_text("w5 w6 w7 w8 <|endoftext|> w9 <|endoftext|> w10 w11 w12")
    assert windows(str(folder), str(text), model, 4, 2).tolist() == [[1, 5, 6, 7], [1, 10, 11, 12]]


def test_all_means_every_recipe_at_every_width_it_has() -> None:
    from flashcomm_megatron.codec.recipes import RECIPES

    rows = sweep.methods([*RECIPES, *BASELINES], range(2, 9), [2, 8], [None], "auto")
    assert len(rows) == 2 * sum(len(row.widths) for row in (*RECIPES.values(), *BASELINES.values()))
    assert len({each.key for each in rows}) == len(rows)


# ---- a real model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories() -> Bench:
    folder = DATA / "stories3M"
    if not folder.exists():
        pytest.skip(f"{folder} is not there; set FLASHCOMM_TEST_DATA")
    model = Llama(str(folder))
    return Bench(model, windows(str(folder), str(DATA / "tinystories.txt"), model, 192, 8), 1, 16, 0)


def test_auto_loses_a_tenth_of_what_flash_v1_loses(stories: Bench) -> None:
    for world in (2, 8):
        ours = stories.score(Config(bits=4, min_bytes=0), world, False)
        theirs = stories.score(Config(bits=4, recipe="flash-v1", min_bytes=0), world, False)
        assert ours.wire_bits <= 5.05, "rows of 192 end in short blocks; 5.0 is for multiples of 1024"
        assert ours.rise <= theirs.rise / 10, f"TP{world}: {ours.rise:.2%} against {theirs.rise:.2%}"


def test_wide_auto_is_nearly_exact(stories: Bench) -> None:
    assert stories.score(Config(bits=8, min_bytes=0), 8, False).rise <= 0.001
    assert stories.score(Config(bits=6, min_bytes=0), 8, False).rise <= 0.005
