"""Laws of planning and coding a whole network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from src.common.errors import PlanError
from src.compression.quantize.compress import build_quantized, candidate_distortion, compress
from src.compression.quantize.layers import QuantizedLayer
from src.compression.quantize.plan import LayerSpec, make_plan
from src.compression.quantize.subvectors import to_subvectors
from tests.support.helpers import lively, outputs, quantized, spec


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 12),
    )  # fmt: skip


def test_general_keys_hold_for_all_layers_and_a_layers_own_keys_come_first() -> None:
    own = LayerSpec(k=4, k_means_type="src", k_means_n_iters=7, subvector_size=2)
    plan = make_plan(small(), spec(8, "kmeans", 3, fc=8, layers={"5": own, "3": LayerSpec(large_subvectors=True)}))
    settings = {name: (p.d, p.k, p.k_means_type, p.k_means_n_iters) for name, p in plan.layers.items()}
    assert settings == {
        "0": (9, 4, "kmeans", 3),
        "3": (18, 8, "kmeans", 3),
        "5": (2, 4, "src", 7),
        "8": (8, 4, "kmeans", 3),
    }
    # 0 has 24 and 8 has 24 subvectors: 4 centroids with at least four each
    small_one = make_plan(
        small(), spec(8, large=True, layers={"3": LayerSpec(large_subvectors=False), "8": LayerSpec(k_means_n_iters=0)})
    )
    assert small_one.layers["3"].d == 9
    assert small_one.layers["8"].k_means_n_iters == 0
    assert small_one.sizes == {"0": 9, "3": 9, "5": 4, "8": 4}
    assert small_one.notes == (
        "0: an odd number of channels (3) cannot be paired: small blocks (d = 9) are used instead of large ones",
    )


def codebooks(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.codebook.detach().clone() for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


@pytest.mark.parametrize(
    "own",
    [
        LayerSpec(k_means_n_iters=0), LayerSpec(k_means_type="src"), LayerSpec(k=4), LayerSpec(large_subvectors=True),
        LayerSpec(subvector_size=18),
    ],
    ids=str,
)  # fmt: skip
def test_an_override_changes_the_codebook_of_its_layer_and_no_other(own: LayerSpec) -> None:
    plain = codebooks(quantized(small(), spec(8, "kmeans", 15)))
    other = codebooks(quantized(small(), spec(8, "kmeans", 15, layers={"3": own})))
    assert [
        name for name in plain if plain[name].shape != other[name].shape or not torch.equal(plain[name], other[name])
    ] == ["3"]


def test_ignored_modules_and_all_below_them_stay_dense() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16)))
            self.b = nn.Linear(16, 16)
            self.alias = self.b
            self.c = nn.Linear(16, 16)

    assert list(make_plan(Net(), spec()).layers) == ["a.0", "a.1.0", "b", "c"]
    assert list(make_plan(Net(), spec(ignored=["a"])).layers) == ["b", "c"]
    assert list(make_plan(Net(), spec(ignored=["a.1", "alias"], layers={"c": LayerSpec(k=2)})).layers) == ["a.0", "c"]
    model = Net()
    dense = model.b.weight
    model = quantized(model, spec(ignored=["alias"]))
    assert model.b.weight is dense
    assert model.b is model.alias


def test_ignoring_comes_before_the_layers_own_keys() -> None:
    assert "8" not in make_plan(small(), spec(ignored=["8"], layers={"8": LayerSpec(k=4)})).layers


def test_a_layer_with_two_names_takes_the_settings_of_either() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.old = nn.Linear(16, 16)
            self.new = self.old

    plan = make_plan(Net(), spec(layers={"new": LayerSpec(k=2)}))
    assert {name: p.k for name, p in plan.layers.items()} == {"old": 2}


def test_unknown_names_are_noted_once_and_take_no_effect() -> None:
    plan = make_plan(small(), spec(ignored=["stem", "0", "stam"], layers={"head": LayerSpec(k=4), "8": LayerSpec(k=4)}))
    assert list(plan.layers) == ["3", "5", "8"]
    assert len(plan.notes) == 3
    assert "ignored_modules" in plan.notes[0]
    assert plan.notes[0].endswith(": stem, stam")
    assert "layer_specs" in plan.notes[1]
    assert plan.notes[1].endswith(": head")
    assert plan.notes[2] == "0: named in ignored_modules, left uncompressed (11.89 % of all weights)"


def test_a_layer_too_small_for_two_centroids_stays_dense_with_a_note() -> None:
    model = nn.Sequential(nn.Linear(4, 7), nn.Linear(4, 8))
    plan = make_plan(model, spec())
    assert list(plan.layers) == ["1"]  # 8 subvectors: 2 centroids
    assert plan.layers["1"].k == 2
    assert plan.notes == ("0: too small for two centroids, left uncompressed (46.67 % of all weights)",)


def test_k_that_is_no_power_of_two_is_refused_naming_the_layer() -> None:
    with pytest.raises(PlanError, match="k = 100"):
        make_plan(small(), spec(100))
    with pytest.raises(PlanError, match=r"'5'.*k = 6 is not a power of two"):
        make_plan(small(), spec(layers={"5": LayerSpec(k=6)}))


def test_all_layers_whose_own_d_does_not_divide_are_named_with_their_keys() -> None:
    with pytest.raises(
        PlanError, match=r"'8' \(12, 16\).*size 5.*layer_specs\.8\.subvector_size.*ignored_modules"
    ) as found:
        make_plan(small(), spec(layers={"8": LayerSpec(subvector_size=5), "3": LayerSpec(subvector_size=7)}))
    assert "layer '3'" in str(found.value)


def test_a_d_for_all_layers_that_does_not_divide_is_replaced_with_one_note() -> None:
    plan = make_plan(small(), spec(fc=5))
    assert plan.layers["8"].d == 4
    assert plan.notes == ("8: fc_subvector_size 5 does not divide 16 inputs per output: subvectors of 4 are used",)


def test_a_weight_that_is_not_finite_is_refused_naming_the_layer() -> None:
    model = small()
    with torch.no_grad():
        model[5].weight[0, 0] = float("nan")
    with pytest.raises(PlanError, match=r"'5'.*not finite"):
        quantized(model)


def test_a_bare_layer_is_replaced_as_a_whole() -> None:
    for layer in (nn.Linear(16, 16), nn.Conv2d(8, 8, 3)):
        found = quantized(layer, spec(4))
        assert isinstance(found, QuantizedLayer)
        assert found.k == 4


def check_coded(dense: nn.Module, model: nn.Module, how) -> None:
    """Every quantized layer has at most k distinct blocks, each code is the nearest, and the rest is as it was."""
    for name, plan in make_plan(dense, how).layers.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        with torch.no_grad():
            weight = layer.eval().weight
        blocks = to_subvectors(weight, plan.d)
        assert torch.unique(blocks, dim=0).shape[0] <= plan.k
        wanted = to_subvectors(dense.get_submodule(name).weight.detach(), plan.d).double()
        distances = torch.cdist(wanted, layer.codebook.detach().double())
        taken = (wanted - blocks.double()).norm(dim=1)
        # chosen in float32, whose error 1e-7 of the squares comes back as its root
        assert torch.allclose(taken, distances.min(1).values, atol=1e-3)


def test_every_layer_has_at_most_k_distinct_blocks_and_the_nearest_ones() -> None:
    dense, how = small(), spec(8)
    check_coded(dense, quantized(copy.deepcopy(dense), how), how)


def test_the_reported_distortion_is_that_of_the_weights() -> None:
    dense = small()
    model, results = compress(copy.deepcopy(dense), make_plan(dense, spec(8)), show_progress=False)
    assert [r.name for r in results] == ["0", "3", "5", "8"]
    for result in results:
        weight = dense.get_submodule(result.name).weight.detach().double()
        with torch.no_grad():
            decoded = model.eval().get_submodule(result.name).weight.double()
        # sums of float32 squares
        assert result.distortion == pytest.approx(float((weight - decoded).square().sum()), rel=1e-4)
        assert result.power == pytest.approx(float(weight.square().sum()), rel=1e-4)
        assert result.relative_error == pytest.approx(result.distortion / result.power)
        assert (result.n_subvectors, result.k) == (weight.numel() // result.d, model.get_submodule(result.name).k)


def test_two_layers_that_share_a_weight_share_codebook_and_codes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    dense = copy.deepcopy(model)
    model = quantized(model, spec(8)).eval()
    assert model[0].codebook is model[2].codebook
    assert model[0].codes_matrix is model[2].codes_matrix
    assert model[0].bias is not model[2].bias
    check_coded(dense, model, spec(8))
    with torch.no_grad():
        assert torch.equal(model[0].weight, model[2].weight)
        model[0].codebook.add_(1)
        assert torch.equal(model[0].weight, model[2].weight)
    model.train()(torch.randn(2, 16)).sum().backward()
    assert len(list(model.parameters())) == 3
    twin = copy.deepcopy(model)
    assert twin[0].codebook is twin[2].codebook


def test_tied_layers_that_cannot_be_coded_alike_stay_dense_with_a_note() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    for how in (
        spec(8, ignored=["1"]),
        spec(8, layers={"1": LayerSpec(k=4)}),
        spec(8, layers={"0": LayerSpec(subvector_size=8)}),
    ):
        plan = make_plan(model, how)
        assert plan.layers == {}
        assert any("shares its weight" in note for note in plan.notes)


def test_a_module_used_twice_stays_one_module() -> None:
    torch.manual_seed(0)
    block = nn.Linear(16, 16)
    model = nn.Sequential(block, nn.ReLU(), block, nn.Sequential(block))
    model = quantized(model, spec(8)).eval()
    assert isinstance(model[0], QuantizedLayer)
    assert model[0] is model[2] is model[3][0]
    x = torch.randn(3, 16)
    with torch.no_grad():
        w, b = model[0].weight, model[0].bias
        y = (x @ w.T + b).relu() @ w.T + b
        assert torch.allclose(model(x), y @ w.T + b, atol=1e-5)  # float32


def test_a_weight_shared_with_an_embedding_is_quantized_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 16)
            self.middle = nn.Linear(16, 16)
            self.head = nn.Linear(16, 20)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.middle(self.embedding(x)))

    model = Net()
    assert list(make_plan(model, spec()).layers) == ["embedding", "middle", "head"]
    plan = make_plan(model, spec(layers={"head": LayerSpec(subvector_size=8)}))
    assert list(plan.layers) == ["middle"]
    assert any("shares its weight with embedding.weight, which is not quantized alike" in note for note in plan.notes)
    model = quantized(model).eval()
    assert model.head.codebook is model.embedding.codebook
    assert torch.equal(model.head.weight, model.embedding.weight)
    assert model(torch.arange(4)).shape == (4, 20)


def test_attention_is_quantized_with_its_packed_projection_and_the_network_still_runs() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    plan = make_plan(model, spec())
    assert list(plan.layers) == ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]
    assert plan.dense == ()
    model = quantized(model)
    # torch's fast path for attention in eval mode reads the weights itself: both ways must run
    x = torch.randn(2, 5, 16)
    found = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            found.append(model(x).detach())
    assert torch.allclose(*found, atol=1e-5)
    assert model.train()(x).shape == (2, 5, 16)


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm, pruned]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_layers_whose_weight_is_computed_stay_dense(wrap) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(16, 16)), nn.Linear(16, 16))
    assert list(make_plan(model, spec()).layers) == ["1"]
    assert quantized(model)(torch.randn(2, 16)).shape == (2, 16)


def test_frozen_layers_stay_frozen() -> None:
    model = small()
    for parameter in model[3].parameters():
        parameter.requires_grad_(False)
    model[8].bias.requires_grad_(False)
    model = quantized(model, spec(8))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["3.codebook", "3.bias", "8.bias"]


def test_training_mode_device_and_dtype_are_kept() -> None:
    model = small().double()
    model[3].eval()
    model = quantized(model, spec(8))
    assert isinstance(model[0], QuantizedLayer)
    assert isinstance(model[0], nn.Conv2d)
    assert (model[0].training, model[3].training) == (True, False)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    half = quantized(small().half(), spec(8))
    assert all(p.dtype == torch.float16 for p in half.parameters())


def test_a_layers_result_does_not_depend_on_the_other_layers_or_their_order() -> None:
    torch.manual_seed(0)
    a, b, c = (nn.Linear(16, 16) for _ in range(3))

    def run(*names: str, seed: int = 0) -> dict[str, Tensor]:
        modules = {"a": a, "b": b, "c": c}
        return codebooks(
            quantized(nn.ModuleDict({name: copy.deepcopy(modules[name]) for name in names}), spec(8), seed)
        )

    wanted = run("a", "b", "c")
    for names in (("c", "b", "a"), ("b",), ("c", "a")):
        found = run(*names)
        assert all(torch.equal(found[name], wanted[name]) for name in names)
    assert not torch.equal(run("a", seed=1)["a"], wanted["a"])
    # equal weights under two names draw from two streams
    twins = codebooks(quantized(nn.ModuleDict({"a": copy.deepcopy(a), "b": copy.deepcopy(a)}), spec(8)))
    assert not torch.equal(twins["a"], twins["b"])


def test_building_for_a_file_clusters_nothing_and_has_the_same_shapes() -> None:
    how = spec(8, iterations=10**9)  # would never end
    with torch.device("meta"):
        model = small()
    built = build_quantized(model, make_plan(model, how))
    assert all(t.is_meta for t in [*built.parameters(), *built.buffers()])
    wanted = quantized(small(), spec(8, iterations=0)).state_dict()
    assert {k: (v.shape, v.dtype) for k, v in built.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in wanted.items()
    }
    real = build_quantized(small(), make_plan(small(), how))
    assert not any(m.codebook.any() or m.codes_matrix.any() for m in real.modules() if isinstance(m, QuantizedLayer))


def test_coding_with_enough_centroids_changes_the_outputs_little() -> None:
    model = lively(small())
    with torch.no_grad():
        for layer in (model[0], model[3], model[5], model[8]):
            layer.weight.copy_(
                layer.weight.sign() * 0.25
            )  # few distinct blocks of one value would be quantized exactly with d = 1
    x = torch.randn(2, 3, 8, 8)
    before = outputs(model, x)
    exact = quantized(copy.deepcopy(model), spec(2, iterations=10, pw=1, fc=1, ignored=["0", "3"])).eval()
    assert torch.allclose(outputs(exact, x), before, atol=1e-5)  # float32


def test_layers_side_by_side_give_what_they_give_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Linear(16, 32), nn.Linear(32, 8))
    found = []
    for processors in (1, 4):
        monkeypatch.setattr(
            "src.compression.quantize.compress.own_processors", lambda processors=processors: processors
        )
        model, layers = compress(
            copy.deepcopy(dense), make_plan(dense, spec(8, "src", 20)), seed=3, show_progress=False
        )
        found.append((model.state_dict(), layers))
    assert found[0][1] == found[1][1]
    assert [layer.name for layer in found[0][1]] == ["0", "1", "2", "3"]
    assert all(torch.equal(tensor, found[1][0][name]) for name, tensor in found[0][0].items())


def test_a_layer_that_cannot_be_clustered_ends_the_others_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The large layer alone would take hours."""
    monkeypatch.setattr("src.compression.quantize.compress.own_processors", lambda: 2)
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 8))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(PlanError, match=r"layer '1'.*not finite"):
        compress(model, make_plan(model, spec(256, "src", 10_000_000)), show_progress=False)
    assert type(model[1]) is nn.Linear


def test_a_quick_look_ranks_orders_as_a_whole_clustering_does() -> None:
    """Equal channels side by side are quantized better than shuffled ones; layers with many subvectors per centroid are
    left to the score."""
    torch.manual_seed(0)
    base = torch.randn(64, 8)
    paired = torch.stack([base, base + 0.01 * torch.randn_like(base)], dim=2).reshape(64, 16)
    model = nn.Sequential(nn.Linear(16, 64))
    measure = candidate_distortion(make_plan(model, spec(16, fc=2)), seed=0)
    shuffled = paired[:, torch.randperm(16)]
    first, again, worse = (measure("0", to_subvectors(weight, 2)) for weight in (paired, paired, shuffled))
    assert first is not None
    assert worse is not None
    assert np.array_equal(first, again)
    assert (first < 0.7 * worse).all()
    with torch.no_grad():
        model[0].weight.copy_(paired)
    (layer,) = compress(model, make_plan(model, spec(16, "src", 100, fc=2)), show_progress=False)[1]
    assert first.mean() == pytest.approx(layer.distortion, rel=0.25)
    assert measure("0", torch.randn(1024 * 16, 2)) is None
