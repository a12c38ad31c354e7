"""An estimate is what is written later, for every family and format, and refuses what must fail."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from convert.checkpoint import open_checkpoint
from convert.description import describe
from convert.export import Export
from convert.export_format import MIXED, ExportFormat
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe
from pruning.recipe.recover_options import RecoverOptions
from pruning.recovery.teacher import prediction_bytes
from pruning.runs.estimate import parameters
from pruning.runs.held import PROCESS_BYTES
from pruning.scores.statistics import load_statistics
from pruning.stages import plan as planning
from pruning.stages.export import export
from pruning.stages.job import resolved
from pruning.stages.probe_windows import random_probe
from pruning.stages.recover_job import open_recovery
from pruning.stages.recovery_sizes import needed_memory
from pruning.stages.size_bounds import byte_range
from pruning.stages.sizes import active_parameters, form_of, token_shares
from tests.support import tiny
from tests.support.command import refused, run
from tests.support.synthetic import statistics
from tests.support.variants import EXPORTED

WIDTH, RATE = 192, 0.7
# An expert's weights outweigh its entries in the header some fifty times, in real models a thousand
# times and more.
SIZES = {"hidden_size": 384, "intermediate_size": 64, "moe_intermediate_size": WIDTH}
SHARED = ("deepseek_v2", "deepseek_v3", "glm4_moe")
WIDE = ("mixtral", "olmoe", "gpt_oss")
V1 = {
    "model_type": "deepseek", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64,
    "moe_intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "max_position_embeddings": 64,
}  # fmt: skip


def saved(family: str, folder):
    sizes = EXPORTED[family] | SIZES
    sizes |= {"n_shared_experts": 2} if family in SHARED else {}
    sizes |= {"intermediate_size": WIDTH} if family in WIDE else {}
    return tiny.save(tiny.half(tiny.tiny_model(family, **sizes)), folder)


def uneven_statistics():
    """Random sums in which half of the experts have nearly all of the attribution."""
    rng = np.random.default_rng(0)
    phi = rng.permuted(np.repeat([[1e-6, 1.0]], 4, axis=1).repeat(2, axis=0), axis=1)
    sizes = {"D": 384, "gradients": False, "expert_details": False}
    return statistics(2, 8, WIDTH, phi=phi, **sizes)


def estimated(folder, tmp_path, *arguments) -> list[dict]:
    path = tmp_path / "estimate.json"
    assert run("estimate", folder, "--no-probe", "--json", path, *arguments) == 0
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPORTED)
def test_sizes_are_within_one_percent_of_what_is_written(family, tmp_path):
    folder = saved(family, tmp_path / "model")
    (found,) = estimated(folder, tmp_path, "--prune-rate", RATE, "--group-size", 32)
    base = open_checkpoint(folder, dtype=jnp.bfloat16)
    formats = base.about.family.formats  # 8 bits are shown where they are asked for
    assert tuple(found["exports"]) == tuple(
        name for name in formats if ExportFormat(name).bits != 8 and name != MIXED
    )
    for name, one in found["exports"].items():
        recipe = CompressionRecipe(
            model=str(folder), output="o", export=(name,), prune_rate=RATE, group_size=32,
            planner="fair",
        )  # fmt: skip
        recipe = resolved(recipe, base.about)
        provenance = {"model_hash": base.fingerprint}
        plan = planning.plan(recipe, uneven_statistics(), provenance, base.about)
        assert (plan.counts == 0).any() == name.startswith("ragged")
        out = export(base, plan, form_of(recipe, name), tmp_path / name, Steps(quiet=True))
        written = sum(file.stat().st_size for file in out.glob("*.safetensors*"))
        assert one["bytes"] == pytest.approx(written, rel=0.01), name
        assert one["fewest_bytes"] <= written <= one["most_bytes"], name
        if name.startswith("padded"):
            assert one["bytes"] == written, name
    total = found["parameters"]["total"]
    assert total == sum(np.prod(v.shape) for v in _tensors(folder).values())


@pytest.mark.parametrize("width", ["free", "layer"])
@pytest.mark.parametrize(
    "name", ["ragged-bf16", "ragged-int4", "layered-bf16", "layered-int4", "padded-bf16"]
)
@for_all(data=st.data())
@settings(max_examples=30, deadline=None)
def test_no_plan_is_outside_of_the_range(bare, name, width, data):
    """Widths drawn at random, as some statistics might ask for, and not by a planner."""
    base = describe(bare)
    recipe = CompressionRecipe(model="m", output="o", export=(name,), width=width, group_size=32)
    recipe, form = resolved(recipe, base), ExportFormat(name, 32)
    full = st.integers(1, WIDTH // 32)
    if width == "layer":
        layers = [[data.draw(full)] * 8 for _ in range(2)]
    else:
        maybe = st.integers(0, WIDTH // 32)
        layers = [  # every token finds its two experts
            [*(data.draw(full) for _ in range(2)), *(data.draw(maybe) for _ in range(6))]
            for _ in range(2)
        ]
    widths = tuple(tuple(32 * blocks for blocks in row) for row in layers)
    fewest, most = byte_range(base, recipe, name, sum(map(sum, widths)))
    assert fewest <= Export(base, widths, form).nbytes <= most


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder with nothing but config.json."""
    folder = saved("mixtral", tmp_path_factory.mktemp("bare"))
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    return folder


def _tensors(folder):
    from safetensors.numpy import load_file

    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_deepseek_v1_is_estimated_as_the_family_it_is_exported_as(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V1))
    (found,) = estimated(tmp_path, tmp_path, "--prune-rate", 0)
    one = found["exports"]["padded-bf16"]
    # each parameter in two bytes, and biases and shared gates that the source does not have
    extra = 3 * 3 * 64 + 2 * 64
    header = one["bytes"] - 2 * (found["parameters"]["total"] + extra)
    assert 0 < header < 200 * (2 * 8 * 3 + 50)
    assert one["clients"]["llama.cpp"]["verdict"] == "no"


def test_a_config_alone_gives_the_same_sizes_as_the_checkpoint(models, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(models / "single" / "config.json", bare)
    whole, alone = (
        estimated(folder, tmp_path, "--prune-rate", 0, 0.5) for folder in (models / "single", bare)
    )
    for one in (*whole, *alone):
        del one["disk"]["free_bytes"]  # others write, too
    # A header may have other words, and other tensors in front.
    files, words = ([one.pop("dense_bytes") for one in some] for some in (whole, alone))
    assert whole == alone and words == pytest.approx(files, abs=1024)
    assert [one["prune_rate"] for one in alone] == [0, 0.5]
    for name in alone[0]["exports"]:
        assert alone[1]["exports"][name]["bytes"] < alone[0]["exports"][name]["bytes"]


def test_parameters_are_where_their_names_say(models, tmp_path):
    (found,) = estimated(models / "single", tmp_path, "--prune-rate", 0.5)
    tensors = {k: v.size for k, v in _tensors(models / "single").items()}

    def count(pattern):
        return sum(size for name, size in tensors.items() if re.search(pattern, name))

    got = found["parameters"]
    assert got["routed"] == count(r"mlp\.experts\.")
    assert got["shared"] == count(r"shared_expert")
    assert got["attention"] == count(r"self_attn")
    assert got["embeddings"] == count(r"embed_tokens|lm_head")
    assert got["total"] == sum(tensors.values())
    idle = got["routed"] * 6 // 8 + count("embed_tokens")  # two of eight experts are active
    assert got["active"] == got["total"] - idle
    kept = found["exports"]["ragged-bf16"]["parameters"]
    assert kept["routed"] == got["routed"] // 2 and kept["shared"] == got["shared"]


def test_active_parameters_are_what_the_tokens_of_the_text_met(scored, models):
    base = open_checkpoint(models / "single")
    sums, _ = load_statistics(scored / "statistics.safetensors")
    plan = PruningPlan.load(scored)
    share = dict(zip(plan.layer_indices, sums.tokens / sums.total_tokens, strict=True))
    kept = dict(zip(plan.layer_indices, plan.counts, strict=True))
    d_expert, met, dense = plan.keep.shape[2], 0.0, 0.0
    for name, tensor in _tensors(models / "single").items():
        place = re.search(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.", name)
        if place:
            layer, expert = map(int, place.groups())
            met += tensor.size * share[layer][expert] * kept[layer][expert] / d_expert
            dense += tensor.size * share[layer][expert]
        elif "embed_tokens" not in name:
            met, dense = met + tensor.size, dense + tensor.size
    shares = token_shares(base.about, sums)
    assert abs(active_parameters(base.about, plan.counts, shares) - met) <= 1
    whole = np.full_like(plan.counts, d_expert)
    assert abs(active_parameters(base.about, whole, shares) - dense) <= 1
    blank = token_shares(base.about, sums.replace(total_tokens=np.zeros(())))
    (found,) = estimated(models / "single", scored.parent, "--prune-rate", 0.5)
    assert active_parameters(base.about, whole, blank) == found["parameters"]["active"]
    assert round(dense) == found["parameters"]["active"]  # each token meets two experts, always


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_active_parameters_agree_with_the_estimate_where_no_text_says_otherwise(family, tmp_path):
    base = open_checkpoint(saved(family, tmp_path / "model"))
    c = base.config
    sums = statistics(len(c.moe_layers), c.moe.num_experts, c.moe.d_expert, D=c.d_model)
    blank = token_shares(base.about, sums.replace(total_tokens=np.zeros(())))
    whole = np.full(blank.shape, c.moe.d_expert)
    assert (
        active_parameters(base.about, whole, blank)
        == parameters(base.about, base.about.widths, 0)["active"]
    )


def test_scoring_time_is_probed_where_weights_are_and_grows_with_the_tokens(models, tmp_path):
    path = tmp_path / "e.json"
    seconds = []
    for tokens in (10_000_000, 1_000_000_000):
        arguments = ("--export", "ragged-bf16", "--max-tokens", tokens, "--json", path)
        assert run("estimate", models / "single", *arguments) == 0
        seconds.append(json.loads(path.read_text())[0]["scoring_seconds"])
    # a hundred times the tokens; another program may run during one of the probes
    assert 0 < 10 * seconds[0] < seconds[1]


def test_without_text_the_time_is_that_of_noise_through_the_layers(tmp_path, capsys):
    path = tmp_path / "e.json"
    assert run("estimate", "demo", "--weights-only", "--probe", "--json", path) == 0
    (found,) = json.loads(path.read_text())
    assert found["tokens"] == 0 and found["scoring_seconds"] > 0
    assert "time to score the weights" in capsys.readouterr().out


def test_a_target_that_only_4_bits_reach_is_estimated_as_compress_would_meet_it(tmp_path):
    folder = saved("qwen3_moe", tmp_path / "model")
    least = {}
    for name in ("ragged-int4", "ragged-bf16"):
        arguments = ("--prune-rate", 0.75, "--export", name, "--group-size", 32)
        (found,) = estimated(folder, tmp_path, *arguments)
        least[name] = found["exports"][name]["bytes"]
    target = int(1.05 * least["ragged-int4"])
    assert target < least["ragged-bf16"]
    size = ("--target-bytes", target, "--group-size", 32)
    (found,) = estimated(folder, tmp_path, *size)
    assert list(found["exports"]) == ["ragged-int4"]
    assert 0.9 * target < found["exports"]["ragged-int4"]["bytes"] <= target
    both = ("--export", "ragged-int4", "padded-bf16")
    (found,) = estimated(folder, tmp_path, *size, *both)
    assert found["exports"]["ragged-int4"]["bytes"] <= target  # the first is what must fit
    assert found["exports"]["padded-bf16"]["bytes"] > 2 * target


def test_a_factor_is_one_of_written_bytes_and_papers_count_is_shown_beside_it(
    bare, tmp_path, capsys
):
    """From a config alone, whose dense model has two bytes for every parameter and a header."""
    options = ("--export", "ragged-int4", "--group-size", 32)
    (found,) = estimated(bare, tmp_path, *options, "--target-factor", 5)
    total, one = found["parameters"]["total"], found["exports"]["ragged-int4"]
    assert 2 * total < found["dense_bytes"] < 2 * total + 100_000
    channel = 3 * describe(bare).config.d_model  # in half a byte each and scales, at most a byte
    assert 0 <= found["dense_bytes"] / 5 - one["bytes"] < 32 * channel + 1024
    table = capsys.readouterr().out
    left = one["parameters"]["total"]
    assert left == total - found["removed"] * found["parameters"]["routed"]
    _, row, *_ = [line.split() for line in table.splitlines() if line.startswith(" ragged-int4 ")]
    assert row[4:6] == ["5.00", f"{4 * total / left:.2f}"]
    assert f"the target, prune rate {found['removed']:.3f}" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-factor", 0.5], r"target_factor=0\.5 must lie in \[1, 1000\]; choose e\.g\. 4"),
        (["--target-factor", 900], r"cannot be met: the smallest feasible plan takes"),
        (["--prune-rate", 1], r"prune_rate=1\.0 must lie in \[0, 1\); choose e\.g\. 0\.25"),
        (["--prune-rate", 0.99], r"prune rate|minimum"),
        (["--group-size", 128], r"group_size=128 does not divide the expert width 64; choose"),
        (["--group-size", 48], r"group_size=48 must be one of \(128, 64, 32\)"),
        (["--target-bytes", "1KB"], r"cannot be met: the smallest feasible plan takes"),
        (["--bits", 16, "--export", "ragged-int4", "--tensor-parallel", 0], r"tensor_parallel=0"),
        (["--json", "absent/e.json"], r"json=absent/e\.json lies in no existing folder"),
    ],
)
def test_the_impossible_is_refused(models, tmp_path, capsys, arguments, message):
    shown = refused(capsys, tmp_path, "estimate", models / "single", "--no-probe", *arguments)
    assert re.search(message, shown), shown


def test_memory_counts_what_windows_longer_than_a_sliding_one_take(tmp_path):
    """A window of 300 tokens is seen by none of 32, and one of 4 by none of 0: their ends, their
    hidden states, what experts make of one and transformers' scores of attention."""
    memory, probes = [], []
    for window in (4, 300):
        sizes = {"sliding_window": window, "max_position_embeddings": 512}
        folder = tiny.save(tiny.tiny_model("dots1", **sizes), tmp_path / str(window))
        (found,) = estimated(folder, tmp_path, "--export", "padded-bf16")
        memory.append(found["memory"])
        probes.append([some.shape for some in random_probe(open_checkpoint(folder))])
    assert probes == [[(8, 32, 1), (2, 36, 1)], [(8, 32, 1), (2, 332, 1)]]
    moe, d = open_checkpoint(folder).config.moe, tiny.SIZES["hidden_size"]
    row = moe.experts_per_token * 4 * (moe.d_expert + d)
    more = 2 * (332 - 36) * d + (332 - 36) * row
    assert memory[1]["verify"] - memory[0]["verify"] == 4 * more
    # Scores of one head; of windows of 32 tokens 8 go at a time, of 36 two, of 332 one.
    work = [
        max(256 * (4 * 32 + row), 72 * (4 * 36 + row)),
        332 * (4 * 332 + row),
    ]
    assert memory[1]["transformers"] - memory[0]["transformers"] == 4 * (work[1] - work[0])
    assert memory[1]["export"] == memory[0]["export"]


def test_memory_counts_the_logits_of_a_probe(tmp_path):
    memory = []
    for vocabulary in (512, 1024):
        sizes = {"vocab_size": vocabulary, "sliding_window": 300, "max_position_embeddings": 512}
        model = tiny.tiny_model("dots1", **sizes, tie_word_embeddings=True)
        folder = tiny.save(model, tmp_path / str(vocabulary))
        (found,) = estimated(folder, tmp_path, "--export", "padded-bf16")
        memory.append(found["memory"])
    logits, weights = 512 * (8 + 2) * 32, 512 * tiny.SIZES["hidden_size"]
    assert memory[1]["verify"] - memory[0]["verify"] == 4 * 5 * logits + (2 + 4) * weights
    more = memory[1]["transformers"] - memory[0]["transformers"]
    assert more == 4 * (3 * logits + 1.25 * weights)


def test_a_probe_without_weights_is_refused(models, tmp_path, capsys):
    shutil.copy(models / "single" / "config.json", tmp_path)
    assert "has no weights to probe" in refused(capsys, tmp_path, "estimate", tmp_path, "--probe")


def verdicts(tmp_path, config: dict, *arguments) -> dict:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (found,) = estimated(tmp_path, tmp_path, "--prune-rate", 0, *arguments)
    return {
        (name, client): said["verdict"]
        for name, one in found["exports"].items()
        for client, said in one["clients"].items()
    }


QWEN = {
    "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 2048, "num_hidden_layers": 2,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts_per_tok": 8,
    "max_position_embeddings": 4096, "norm_topk_prob": True,
}  # fmt: skip


def test_clients_follow_the_rules_of_real_sizes(tmp_path):
    found = verdicts(tmp_path, QWEN)
    for client in ("transformers 5", "transformers 4.57", "vLLM", "SGLang", "llama.cpp"):
        assert found["padded-int4", client] == found["padded-bf16", client] == "yes"
    for name in ("ragged-int4", "ragged-bf16", "layered-int4", "layered-bf16"):
        assert found[name, "vLLM"] == ("slower" if name.startswith("ragged") else "yes")
        assert found[name, "transformers 5"] == found[name, "transformers 4.57"] == "slower"
        assert found[name, "llama.cpp"] == found[name, "SGLang"] == "no"


@pytest.mark.parametrize(("width", "verdict"), [(768, "yes"), (96, "slower")])
def test_the_fused_layers_of_a_layered_folder_follow_the_rules_of_their_kernels(
    tmp_path, width, verdict
):
    """96 channels are no multiple of 64, which 4-bit kernels pad to."""
    config = QWEN | {"moe_intermediate_size": width}
    found = verdicts(tmp_path, config, "--group-size", 32)
    assert found["layered-int4", "vLLM"] == found["padded-int4", "vLLM"] == verdict
    assert found["layered-bf16", "vLLM"] == "yes"
    found = verdicts(tmp_path, config, "--group-size", 32, "--tensor-parallel", 2)
    assert found["layered-bf16", "vLLM"] == "no"


@pytest.mark.parametrize(
    ("width", "parallel", "verdict"),
    # 768 / 8 = 96 is no multiple of 64; 768 / 16 = 48 cuts a group of 32; 5 divides nothing
    [(768, 4, "yes"), (768, 8, "slower"), (768, 16, "no"), (768, 5, "no")],
)
def test_tensor_parallelism_must_leave_whole_groups(tmp_path, width, parallel, verdict):
    config = QWEN | {"moe_intermediate_size": width}
    found = verdicts(tmp_path, config, "--tensor-parallel", parallel, "--group-size", 32)
    assert found["padded-int4", "vLLM"] == verdict
    assert found["padded-int4", "transformers 5"] == "yes"


def test_deepseek_v3_without_topk_method_is_not_for_vllm(tmp_path):
    model = tiny.tiny_model("deepseek_v3", **(EXPORTED["deepseek_v3"] | {"hidden_size": 64}))
    config = model.config.to_dict()
    export = ("--export", "padded-bf16")
    assert verdicts(tmp_path, config, *export)["padded-bf16", "vLLM"] == "no"
    config["topk_method"] = "noaux_tc"
    assert verdicts(tmp_path, config, *export)["padded-bf16", "vLLM"] == "yes"


GPT_OSS = {
    "model_type": "gpt_oss", "vocab_size": 512, "hidden_size": 2880, "num_hidden_layers": 2,
    "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128,
    "max_position_embeddings": 4096, "rope_theta": 150000, "rope_scaling": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("parallel", "float4", "half"),
    # 90 blocks: 45 each for two, 22.5 for four; of 64 GPUs 45 get two each and the others none
    [(1, "yes", "yes"), (2, "yes", "yes"), (4, "slower", "yes"), (64, "no", "yes")],
)
def test_blocks_of_four_bit_floats_are_dealt_out_whole(tmp_path, parallel, float4, half):
    found = verdicts(tmp_path, GPT_OSS, "--tensor-parallel", parallel)
    assert {name for name, _ in found} == {"ragged-bf16", "padded-bf16", "padded-mxfp4"}
    # run by `tests/clients`; never split over GPUs
    assert found["ragged-bf16", "vLLM"] == ("slower" if parallel == 1 else "no")
    assert found["padded-mxfp4", "vLLM"] == found["padded-mxfp4", "SGLang"] == float4
    assert found["padded-bf16", "vLLM"] == half
    assert found["padded-mxfp4", "transformers 4.57"] == "yes"


def test_what_a_client_does_not_read_from_the_config_must_be_as_it_is_built(tmp_path):
    """Found by `tests/clients`: these loaded, with other logits."""
    export = ("--export", "padded-bf16")
    found = verdicts(tmp_path, QWEN | {"norm_topk_prob": False}, *export)
    assert found["padded-bf16", "llama.cpp"] == "no"
    assert found["padded-bf16", "transformers 4.57"] == "yes"
    found = verdicts(tmp_path, GPT_OSS | {"swiglu_limit": 6.0}, *export)
    assert found["padded-bf16", "transformers 4.57"] == "no"
    assert found["padded-bf16", "transformers 5"] == "yes"
    found = verdicts(tmp_path, GPT_OSS | {"swiglu_limit": 6.0}, "--export", "ragged-bf16")
    assert found["ragged-bf16", "transformers 4.57"] == "slower"  # its own file reads the limit
    yarn = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096}  # fmt: skip
    for truncate, verdict in ((True, "yes"), (False, "no")):
        config = GPT_OSS | {"rope_scaling": yarn | {"truncate": truncate}}
        assert verdicts(tmp_path, config, *export)["padded-bf16", "llama.cpp"] == verdict


@pytest.mark.parametrize("heads", [16, 4])
def test_olmoe_with_shared_keys_is_not_for_llama_cpp(tmp_path, heads):
    sizes = EXPORTED["olmoe"] | {"num_attention_heads": 16, "num_key_value_heads": heads}
    config = tiny.tiny_model("olmoe", **(sizes | {"hidden_size": 64})).config.to_dict()
    found = verdicts(tmp_path, config, "--export", "padded-bf16")
    assert found["padded-bf16", "llama.cpp"] == ("yes" if heads == 16 else "no")


@pytest.mark.parametrize("name", ["ragged-bf16", "layered-bf16"])
def test_latent_attention_with_a_modelling_file_is_slower_in_vllm(tmp_path, name):
    model = tiny.tiny_model("deepseek_v3", **(EXPORTED["deepseek_v3"] | {"hidden_size": 64}))
    config = model.config.to_dict() | {"topk_method": "noaux_tc"}
    found = verdicts(tmp_path, config, "--export", name)
    assert found[name, "vLLM"] == found[name, "transformers 4.57"] == "slower"


def test_attention_heads_must_be_divided_and_ragged_folders_are_not(tmp_path):
    config = QWEN | {"num_attention_heads": 6, "num_key_value_heads": 2}
    assert verdicts(tmp_path, config, "--tensor-parallel", 2)["padded-bf16", "vLLM"] == "yes"
    found = verdicts(tmp_path, config, "--tensor-parallel", 4)
    assert found["padded-bf16", "vLLM"] == found["ragged-bf16", "vLLM"] == "no"
    assert found["padded-bf16", "transformers 5"] == "yes"


def test_a_stored_recipe_is_estimated_as_it_was_run(scored, tmp_path):
    """The recipe of an output folder, flags on top; the plan was made from real statistics."""
    path, recipe = tmp_path / "e.json", scored / "recipe.yaml"
    arguments = ("--prune-rate", 0.5, "--export", "ragged-bf16", "--no-probe", "--json", path)
    assert run("estimate", "--recipe", recipe, *arguments) == 0
    (found,) = json.loads(path.read_text())
    export = scored / "exports" / "ragged-bf16"
    written = sum(file.stat().st_size for file in export.glob("*.safetensors*"))
    one = found["exports"]["ragged-bf16"]
    assert one["fewest_bytes"] <= written <= one["most_bytes"]


def test_names_that_compress_refuses_are_refused(models, tmp_path, capsys):
    for option, value in (("--planner", "fairr"), ("--criterion", "shaply"), ("--weights", "x")):
        arguments = ("estimate", models / "single", "--no-probe", option, value)
        assert "is unknown; " in refused(capsys, tmp_path, *arguments)


def test_training_afterwards_is_estimated_as_recover_finds_it(models, scored, texts, tmp_path):
    how = ("--prune-rate", 0.5, "--export", "ragged-bf16", "--recovery-tokens", "0.448K")
    (found,) = estimated(models / "single", tmp_path, *how)
    told, steps = found["recovery"], Steps(quiet=True)
    out = shutil.copytree(scored, tmp_path / "out")  # experts of one width, as the estimate has it
    assert run("plan", out, "--planner", "uniform", "--prune-rate", 0.5) == 0
    assert told["tokens"] == 448 and found["recovery_seconds"] is None
    assert set(told["trained"]) == {"router", "lora", "dora", "full"}
    for train, one in told["trained"].items():
        for mode in ("model", "layer"):
            options = RecoverOptions(
                text=(str(texts / "good.txt"),), output="o", tokens=448, train=train, mode=mode
            )
            job = open_recovery(out, options.filled(), steps)
            source = job.student.source
            layers = [source.layer(index) for index in range(len(source))]
            windows = len(job.text.tokens) + len(job.held.tokens)
            bytes_, numbers = needed_memory(
                layers, source.config, job.deltas, job.options, windows * job.window, job.window
            )
            assert one["parameters"] == pytest.approx(numbers, rel=0.02)
            assert one["memory_bytes"][mode] - PROCESS_BYTES == pytest.approx(bytes_, rel=0.1)
        assert one["checkpoint_bytes"] == pytest.approx(36 * numbers, rel=0.02)
    size = prediction_bytes(windows, job.window, RecoverOptions(text=("a",), output="o").top)
    assert told["predictions_bytes"] == size


def test_the_time_of_training_afterwards_grows_with_its_text(models, tmp_path, capsys):
    path, seconds = tmp_path / "e.json", []
    for tokens in ("10M", "1000M"):
        how = ("--export", "ragged-bf16", "--recovery-tokens", tokens, "--json", path)
        assert run("estimate", models / "single", *how) == 0
        seconds.append(json.loads(path.read_text())[0]["recovery_seconds"])
    assert 0 < 10 * seconds[0] < seconds[1]
    shown = " ".join(capsys.readouterr().out.split())
    assert "Training afterwards" in shown and "On 1,000,000,000 tokens of text" in shown


def test_no_text_to_train_on_is_refused(models, tmp_path, capsys):
    found = refused(capsys, tmp_path, "estimate", models / "single", "--recovery-tokens", "0")
    assert "tokens=0 must be at least 1" in found
