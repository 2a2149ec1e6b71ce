"""What is taken of a checkpoint: one network, the plain one, all of it accounted for; all else is asked about."""

from argparse import Namespace

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from backbench.common.backbones.load import body_fingerprint, load_backbone, load_classifier, save_backbone
from backbench.common.backbones.resnet import ARCHS, Classifier, Trunk
from backbench.common.base.errors import UserError
from backbench.common.base.files import file_and_choice


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """A whole classifier under torchvision's names, its statistics trained."""
    torch.manual_seed(0)
    model = Classifier(Trunk("resnet18_half"), 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.torchvision_state()


def under(prefix: str, state: dict, shift: float = 0.0) -> dict:
    return {prefix + k: v + shift if v.is_floating_point() else v for k, v in state.items()}


def fingerprint(state: dict, shift: float = 0.0) -> str:
    trunk = Trunk("resnet18_half")
    trunk.load_state_dict({k: v for k, v in under("", state, shift).items() if not k.startswith("fc.")})
    return body_fingerprint(trunk)


def load(content, folder, name="x.pth", choice="", **options):
    torch.save(content, folder / name)
    return load_backbone(str(folder / name) + choice, **options)


def refusal(content, folder, **options) -> str:
    with pytest.raises(UserError) as error:
        load(content, folder, **options)
    assert "\n" not in str(error.value) and "x.pth" in str(error.value)
    return str(error.value)


# two networks: the first is shifted by 0, the second by 0.5
PAIRS = {
    "timm": (lambda a, b: {"state_dict": a, "state_dict_ema": b, "epoch": 3}, "raw", "ema"),
    "torchvision": (lambda a, b: {"model": a, "model_ema": under("module.", b)}, "raw", "ema"),
    "a shadow": (lambda a, b: {"model": a, "ema": {"shadow": b, "decay": 0.99}}, "raw", "ema"),
    "one dict": (lambda a, b: {**under("net.", a), **under("ema_net.", b)}, "raw", "ema"),
    "Lightning's callback": (
        lambda a, b: {
            "state_dict": under("model.", a),
            "callbacks": {"EMA": {"ema_state": under("model.", b)}},
        },
        "raw",
        "ema",
    ),
    "mmengine, which swaps them": (
        lambda a, b: {
            "state_dict": under("backbone.", b),
            "ema_state_dict": {**under("module.backbone.", a), "steps": torch.tensor(9)},
        },
        "raw",
        "ema",
    ),
    "Lightning's WeightAveraging, which swaps them": (
        lambda a, b: {
            "state_dict": under("model.", b),
            "current_model_state": under("model.", a),
            "averaging_state": {"n_averaged": torch.tensor(9)},
        },
        "raw",
        "ema",
    ),
    "distillation": (lambda a, b: {"student": a, "teacher": b}, "student", "teacher"),
    "a teacher inside": (lambda a, b: under("student.", a) | under("teacher.", b), "student", "teacher"),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_of_two_networks_the_one_asked_for_is_taken(pair, state, tmp_path):
    make, one, two = PAIRS[pair]
    content = make(state, under("", state, 0.5))
    line = refusal(content, tmp_path)
    assert "holds 2 networks of different weights; say --weights" in line
    assert f"{one} (" in line and f"{two} (" in line and "FILE#" in line
    assert load(content, tmp_path, weights=one).fingerprint == fingerprint(state)
    second = load(content, tmp_path, weights=two)
    assert (
        second.fingerprint == load(content, tmp_path, choice=f"#{two}").fingerprint == fingerprint(state, 0.5)
    )
    assert second.name == second.group == f"x-{two}"  # beside the other one of the same file on a board
    assert any("took" in line and "as asked for" in line for line in second.report)
    assert "names no network" in refusal(content, tmp_path, weights="momentum")


def test_a_prefix_names_a_network_too(state, tmp_path):
    content = {"nets": {**under("a.", state), **under("b.", state, 0.5)}}
    assert "--weights nets.a ('nets.a.') or nets.b ('nets.b.')" in refusal(content, tmp_path)
    assert load(content, tmp_path, weights="nets.b").fingerprint == fingerprint(state, 0.5)
    assert load(content, tmp_path, weights="nets.a.").fingerprint == fingerprint(state)


def test_equal_networks_are_one(state, tmp_path):
    backbone = load({"model": state, "model_ema": dict(state)}, tmp_path)
    assert backbone.fingerprint == fingerprint(state) and backbone.name == "x"
    assert "the same weights also stand under 'model_ema.'" in backbone.report


METHODS = {
    "MoCo": ("encoder_q.", "encoder_k.", {"queue": torch.ones(3, 2)}),
    "MoCo v3": (
        "module.base_encoder.",
        "module.momentum_encoder.",
        {"module.predictor.0.weight": torch.ones(2, 2)},
    ),
    "BYOL": (
        "online_encoder.net.",
        "target_encoder.net.",
        {"online_predictor.net.0.weight": torch.ones(2, 2)},
    ),
    "DINO": (
        "teacher.backbone.",
        "student.module.backbone.",
        {"student.module.head.last_layer.weight_g": torch.ones(2)},
    ),
    "solo-learn": ("backbone.", "momentum_backbone.", {"momentum_projector.0.weight": torch.ones(2, 2)}),
    "lightly": (
        "backbone.",
        "backbone_momentum.",
        {"projection_head_momentum.layers.0.weight": torch.ones(2, 2)},
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_own_file_gives_what_its_authors_evaluate(method, state, tmp_path):
    evaluated, other, mark = METHODS[method]
    content = under(evaluated, state) | under(other, state, 0.5) | mark
    backbone = load(content, tmp_path)
    assert backbone.fingerprint == fingerprint(state)
    assert any(line.endswith(f"{method}'s authors evaluate it") for line in backbone.report)
    assert load(content, tmp_path, weights=other).fingerprint == fingerprint(state, 0.5)
    narrow = {k: v[:2] if k == f"{other}layer4.1.bn2.weight" else v for k, v in content.items()}
    assert "holds 2 networks" in refusal(narrow, tmp_path)  # of unlike shapes: no method's own


def test_a_student_beside_a_teacher_of_another_kind_is_asked_about(state, tmp_path):
    content = {"student": state, "teacher": {"blocks.0.conv_dw.weight": torch.ones(3)}}
    line = refusal(content, tmp_path)
    assert "a second network that is no ResNet (teacher.blocks.0.conv_dw.weight …)" in line
    assert "say --weights student" in line
    assert load(content, tmp_path, weights="student").fingerprint == fingerprint(state)


def test_averages_whose_names_lost_their_dots_are_asked_about(state, tmp_path):
    averages = {f"ema_{k.replace('.', '_')}": v for k, v in state.items()}
    line = refusal({**state, **averages}, tmp_path)
    assert "averaged weights under names that cannot be read (ema_conv1_weight …)" in line
    assert load({**state, **averages}, tmp_path, weights="raw").fingerprint == fingerprint(state)
    shadow = {"model": state, "ema": {"decay": 0.99, "shadow_params": list(state.values())}}  # torch_ema
    assert "cannot be read (ema.shadow_params.0 …); say --weights model" in refusal(shadow, tmp_path)
    assert load(shadow, tmp_path, weights="raw").fingerprint == fingerprint(state)


def test_one_network_or_none_to_choose(state, tmp_path, capsys):
    assert "names no network in it; it holds one (no prefix)" in refusal(state, tmp_path, weights="ema")
    with pytest.raises(UserError, match="drop --weights"):
        load_backbone("scratch:resnet18_half", weights="ema")


def test_a_file_whose_name_has_the_mark(state, tmp_path):
    assert load(state, tmp_path, name="run#3.pth").name == "run#3"
    assert file_and_choice("runs/x.pth#ema") == ("runs/x.pth", "ema")
    assert file_and_choice("runs/x.pth") == ("runs/x.pth", None)


STRANGERS = {
    "gates between stages": {"gate1.weight": torch.ones(4), "gate2.fc.weight": torch.ones(4, 4)},
    "a norm before the stem": {"bn0.weight": torch.ones(3), "bn0.running_mean": torch.zeros(3)},
    "a norm called bn": {"bn.weight": torch.ones(3), "bn.running_mean": torch.zeros(3)},
    "a fifth stage": {"layer5.0.conv1.weight": torch.ones(4, 4, 1, 1)},
    "a learnt pooling": {"pool.p": torch.ones(1)},
    "a number": {"alpha": torch.tensor(0.5)},
}


@pytest.mark.parametrize("what", STRANGERS)
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_what_may_stand_between_the_stages_is_refused_by_name(what, prefix, state, tmp_path):
    extra = under(prefix, STRANGERS[what])
    line = refusal({"state_dict": under(prefix, state) | extra, "best_acc1": torch.tensor(9.0)}, tmp_path)
    assert f"{len(extra)} tensors belong neither to a plain ResNet nor to a known head" in line
    assert next(iter(STRANGERS[what])) in line
    modules = line.rpartition("--leave-out ")[2].split(",")
    content = {"state_dict": under(prefix, state) | extra}
    assert load(content, tmp_path, leave_out=modules).fingerprint == fingerprint(state)  # as the line says


def test_only_the_modules_named_are_left_out(state, tmp_path):
    content = {**state, "gate.weight": torch.ones(3), "gate2.weight": torch.ones(3)}
    assert "1 tensors belong neither" in refusal(content, tmp_path, leave_out=["gate"])


KNOWN = {  # file: keys beside the body under "backbone."
    "Barlow Twins": {"projector.0.weight": torch.ones(3, 3), "bn.running_mean": torch.ones(3)},
    "SwAV": {"projection_head.0.weight": torch.ones(3, 3), "prototypes.weight": torch.ones(3, 3)},
    "VICReg": {"projector.0.weight": torch.ones(3, 3), "projector.1.running_var": torch.ones(3)},
    "mmdetection": {
        "neck.lateral_convs.0.conv.weight": torch.ones(3),
        "rpn_head.rpn_conv.weight": torch.ones(3),
    },
    "torchvision's detector": {
        "rpn.head.conv.0.0.weight": torch.ones(3),
        "roi_heads.x.weight": torch.ones(3),
    },
    "Lightning's metrics": {"train_acc.tp": torch.ones(3), "criterion.weight": torch.ones(3)},
    "DETR": {"query_embed.weight": torch.ones(3, 3), "transformer.level_embed": torch.ones(3, 3)},
    "Deformable DETR of mmdetection": {
        "query_embedding.weight": torch.ones(3, 3),
        "level_embed": torch.ones(3),
    },
    "BYOL of sthalles": {"projetion.net.0.weight": torch.ones(3, 3)},
    "weights of a loss": {"class_weights": torch.ones(3), "pos_weight": torch.ones(3)},
    "a normaliser": {
        "normalize.mean": torch.tensor([0.485, 0.456, 0.406]),
        "normalize.std": torch.tensor([0.229, 0.224, 0.225]),
    },
}


@pytest.mark.parametrize("file", KNOWN)
def test_known_heads_are_left_out_and_named(file, state, tmp_path):
    content = {"state_dict": under("backbone.", state) | KNOWN[file], "best_acc1": torch.tensor(9.0)}
    backbone = load(content, tmp_path)
    assert backbone.fingerprint == fingerprint(state)
    assert any(line.startswith("left out") for line in backbone.report)


@pytest.mark.parametrize("body", ["0.", "model.0."])
def test_what_follows_the_body_in_a_sequence_is_its_head(body, state, tmp_path):
    """fastai's learners, nn.Sequential(body, head); what precedes the body is none."""
    outer = body[:-2]
    head = {f"{outer}1.2.running_mean": torch.ones(3), f"{outer}1.8.weight": torch.ones(3, 3)}
    assert load(under(body, state) | head, tmp_path).fingerprint == fingerprint(state)
    assert f"{outer}0.weight" in refusal(
        under(f"{outer}1.", state) | {f"{outer}0.weight": torch.ones(3)}, tmp_path
    )


@pytest.mark.parametrize("more", [{}, {"projector.0.weight": torch.ones(8, 8)}])
def test_a_norm_beside_the_network_that_no_projector_feeds_is_refused(more, state, tmp_path):
    norm = {"bn.weight": torch.ones(3), "bn.running_mean": torch.zeros(3)}
    assert "2 tensors belong neither" in refusal(under("net.", state) | norm | more, tmp_path)


def test_a_network_that_normalises_otherwise_is_refused(state, tmp_path):
    content = {**state, "normalizer.new_mean": torch.tensor([0.5] * 3)[:, None, None]}
    line = refusal(content, tmp_path)
    assert line.endswith("say --input-mean 0.5,0.5,0.5")
    assert load(content, tmp_path, mean=(0.5, 0.5, 0.5)).mean == (0.5,) * 3


OTHER = {
    "arch": {"arch": "resnetblur18"},
    "a width": {"arch": "resnet50"},
    "timm's model": {"args": Namespace(model="resnet18d", lr=0.1)},
    "timm's activation": {"args": Namespace(model="resnet18_half", act_layer="silu")},
    "timm's pooling": {"args": {"model": "resnet18_half", "gp": "max"}},
    "epsilon": {"args": Namespace(bn_eps=0.001)},
    "model_args": {"model_args": {"num_classes": 4, "gated": True}},
    "nested": {"hyper_parameters": {"model": {"name": "resnet18_half", "act": "gelu"}}},
    "a class": {"config": {"model": {"_target_": "torchvision.models.wide_resnet50_2"}}},
    "timm's kwargs": {"args": Namespace(model_kwargs={"aa_layer": "blurpool"})},
    "an unknown one": {"arch": "gated18"},
}


@pytest.mark.parametrize("what", OTHER)
def test_a_file_that_calls_itself_something_else_is_believed(what, state, tmp_path):
    content = {"state_dict": state, **OTHER[what]}
    line = refusal(content, tmp_path)
    assert "it says of itself that" in line and line.endswith("say --arch resnet18_half")
    backbone = load(content, tmp_path, arch="resnet18_half")
    assert backbone.fingerprint == fingerprint(state)
    assert any("as asked for, though the file says" in line for line in backbone.report)


SAME = {
    "official CutMix": {"arch": "resnet"},
    "itself": {"arch": "resnet18_half"},
    "timm": {
        "arch": "resnet18_half.a1_in1k",
        "args": Namespace(
            model="resnet18_half", gp=None, act_layer=None, bn_eps=None, model_kwargs={}, mean=None
        ),
    },
    "a method": {"arch": "moco_v2", "args": Namespace(arch="resnet18_half-moco", blur=True)},
    "Lightning": {
        "hyper_parameters": {
            "backbone": {"name": "resnet18_half", "kwargs": {"act_layer": "ReLU"}},
            "method": "simclr",
            "optimizer": {"name": "lars", "norm": "x"},
            "projector": {"activation": "gelu"},
            "augmentations": {"blur": 0.5},
        }
    },
    "Hydra": {
        "config": {"model": {"_target_": "src.models.LitModule", "net": {"_target_": "models.resnet"}}}
    },
}


@pytest.mark.parametrize("what", SAME)
def test_a_file_that_calls_itself_the_plain_network_loads(what, state, tmp_path):
    assert load({"state_dict": state, **SAME[what]}, tmp_path).fingerprint == fingerprint(state)


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "resnet50.a1_in1k",
        "tv_resnet50",
        "ResNet-50",
        "r50",
        "resnet50_v1b",
        "torchvision.models.resnet50",
        "mocov2_resnet50",
        "gluon_resnet50_v1b",
        "RN50",
    ],
)
def test_names_of_the_plain_resnet50(name):
    from backbench.common.backbones.declared import contradiction

    assert contradiction({"arch": name}, "resnet50") is None
    assert contradiction({"arch": name}, "resnet101")


@pytest.mark.parametrize(
    "name",
    [
        "resnet50d",
        "resnet50_v2",
        "wide_resnet50_2",
        "resnet50_gn",
        "seresnet50",
        "resnetaa50",
        "resnet50_silu",
        "resnext50_32x4d",
        "resnetv2_50",
        "ecaresnet50t",
    ],
)
def test_names_of_no_plain_resnet50(name):
    from backbench.common.backbones.declared import contradiction

    assert contradiction({"args": {"model": name}}, "resnet50")


def test_the_input_that_a_config_states_is_believed(state, tmp_path):
    config = {"mean": (0.5, 0.5, 0.5), "std": [0.5, 0.5, 0.5], "input_size": (3, 160, 160)}
    backbone = load({"state_dict": state, "pretrained_cfg": config}, tmp_path)
    assert (backbone.mean, backbone.std, backbone.input_size) == ((0.5,) * 3, (0.5,) * 3, 160)
    assert load({"model": state, "args": Namespace(mean=[0.4] * 3)}, tmp_path).mean == (0.4,) * 3


WRAPPED = {
    "torch.compile of stages": lambda k: k.replace("layer1.", "layer1._orig_mod."),
    "torch.compile": lambda k: f"_orig_mod.{k}",
    "activation checkpoints": lambda k: k.replace(".0.conv", ".0._checkpoint_wrapped_module.conv"),
    "FSDP": lambda k: f"_fsdp_wrapped_module.{k.replace('layer2.', 'layer2._fsdp_wrapped_module.')}",
    "DDP of a stage": lambda k: k.replace("layer3.", "layer3.module."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_inside_the_names_are_seen_through(wrapper, state, tmp_path):
    content = {WRAPPED[wrapper](k): v for k, v in state.items()}
    assert load(content, tmp_path).fingerprint == fingerprint(state)
    assert load_classifier(tmp_path / "x.pth")[1]["num_classes"] == 4


def test_counts_of_batches_in_any_shape(state, tmp_path):
    counts = {k: torch.full((1,), 7) for k in state if k.endswith("num_batches_tracked")}
    backbone = load({**state, **counts}, tmp_path)
    assert backbone.fingerprint == fingerprint(state)
    assert backbone.trunk.bn1.num_batches_tracked.item() == 7


def test_another_conv1_before_the_resnets_is_no_stem(state, tmp_path):
    content = under("encoder.", state) | {"decoder.aspp.conv1.weight": torch.ones(3, 3, 3, 3)}
    backbone = load(content, tmp_path)
    assert backbone.fingerprint == fingerprint(state) and "key prefix 'encoder.' removed" in backbone.report
    assert "1 tensors belong neither" in refusal(
        under("z.", state) | {"aspp.conv1.weight": torch.ones(3)}, tmp_path
    )


def shapes(arch: str, **options) -> dict[str, torch.Tensor]:
    """A network of torchvision as expanded zeros: its names and shapes in no memory."""
    import torchvision

    with torch.device("meta"):
        meta = torchvision.models.get_model(arch, **options).state_dict()
    return {k: torch.zeros(()).expand(v.shape) for k, v in meta.items()}


@pytest.mark.parametrize(
    "arch", ["wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"]
)
def test_relatives_are_called_by_their_names(arch, tmp_path):
    from backbench.common.backbones.find_resnet import recognise

    with pytest.raises(UserError, match=f"x.pth: a {arch}: its body"):
        recognise(shapes(arch), "x.pth")


UNLIKE = {
    "grey": ("conv1.weight", lambda v: v[:, :1], "takes 1 channel, not 3"),
    "four channels": ("conv1.weight", lambda v: torch.cat([v, v[:, :1]], 1), "takes 4 channels, not 3"),
    "3×3": ("conv1.weight", lambda v: v[..., :3, :3], "a CIFAR network .*takes those of pretrain/run.py"),
    "5×5": ("conv1.weight", lambda v: v[..., :5, :5], "first convolution is 5×5"),
    "GroupNorm": ("running_", None, "norms keep no statistics"),
    "no stem": ("conv1.weight", None, "no stem before them"),
    "sparse": ("layer1.0.conv1.weight", lambda v: v.to_sparse(), "is a sparse tensor"),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_unlike_networks_get_a_line_of_their_own(what, state, tmp_path):
    key, change, message = UNLIKE[what]
    if change:
        content = {**state, key: change(state[key])}
    else:
        content = {k: v for k, v in state.items() if not (k == key or (key[-1] == "_" and key in k))}
    with pytest.raises(UserError, match=message):
        load(content, tmp_path)


@pytest.mark.parametrize(
    "arch, message",
    [
        ("efficientnet_b0", "a MobileNet, an EfficientNet"),
        ("vgg11", "a VGG"),
        ("densenet121", "a DenseNet"),
    ],
)
def test_other_families_are_called_by_their_names(arch, message):
    from backbench.common.backbones.find_resnet import find_resnet

    with pytest.raises(UserError, match=f"x.pth: {message}.*not a ResNet"):
        find_resnet(shapes(arch), "x.pth")


def test_every_command_that_takes_a_backbone_takes_the_choice(state, tmp_path, capsys):
    """The same file and choice through pretrain/evaluate.py's loader and through `backbench export`."""
    from backbench.common.cli.main import _main
    from backbench.common.run.transfer import reading
    from backbench.pretrain.evaluate import arguments
    from backbench.pretrain.evaluate import load as load_evaluated

    path = tmp_path / "x.pth"
    torch.save({"state_dict": state, "state_dict_ema": under("", state, 0.5), "arch": "resnetblur18"}, path)
    args = arguments().parse_args(["--backbone", str(path), "--weights", "ema", "--arch", "resnet18_half"])
    assert load_evaluated(args.backbone, **reading(args))[1]["fingerprint"] == fingerprint(state, 0.5)
    out = tmp_path / "y.safetensors"
    choice = [f"{path}#ema", "--arch", "resnet18_half", "--to", "safetensors", "--out", str(out)]
    assert _main(["export", *choice]) == 0
    assert load_backbone(str(out)).fingerprint == fingerprint(state, 0.5)
    assert "took 'state_dict_ema.', not no prefix" in capsys.readouterr().out


def test_a_grid_takes_two_networks_of_one_file(state, tmp_path, monkeypatch):
    from backbench.common.grid.facts import Facts
    from backbench.common.grid.plan import name_group, parse_backbone

    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state, "state_dict_ema": under("", state, 0.5)}, tmp_path / "x.pth")
    facts = Facts(tmp_path / "facts.json")
    found = [name_group(*parse_backbone(f"x.pth#{which}"), facts)[0] for which in ("raw", "ema")]
    assert [b.label for b in found] == ["x-raw", "x-ema"]
    assert [b.spec for b in found] == [f"{tmp_path}/x.pth#raw", f"{tmp_path}/x.pth#ema"]
    with pytest.raises(UserError, match="say --weights"):
        name_group("", ("x.pth",), facts)


def test_this_projects_own_files_are_as_they_were(state, tmp_path):
    torch.manual_seed(0)
    model = Classifier(Trunk("resnet18_half"), 4)
    model.trunk.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    save_backbone(
        tmp_path / "x.pt", model, arch="resnet18_half", num_classes=4, method="cutmix", recipe={"arch": "x"}
    )
    backbone = load_backbone(str(tmp_path / "x.pt"))
    assert backbone.fingerprint == fingerprint(state) and backbone.name == "cutmix"
    assert "left out 2 keys that are no body: fc.bias, fc.weight" in backbone.report


def test_a_network_is_one_line_of_the_table(monkeypatch, tmp_path):
    """A wider ResNet is refused as what it is, and with its line in the table loads with equal features."""
    model = ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=128).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(0.1)
    path = tmp_path / "wide.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(UserError, match="groups 1 of 128"):
        load_backbone(str(path))
    monkeypatch.setitem(ARCHS, "wide", (Bottleneck, (1, 1, 1, 1), 64, 1, 128))
    backbone = load_backbone(str(path))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model.avgpool, model.fc = nn.Identity(), nn.Identity()
    with torch.no_grad():
        assert backbone.arch == "wide"
        assert torch.equal(backbone.trunk.eval()(images).flatten(1), model(images))
