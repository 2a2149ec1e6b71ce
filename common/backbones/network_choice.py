"""Which of a file's networks is taken: the only one, the one asked for, or the one its method's authors evaluate.

A file may hold the trained weights beside their average, a student beside its teacher, a query beside a key network.
Which one was meant is asked about, never guessed: the scores differ by many points and no shape tells them apart.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from backbench.common.base.errors import UserError

AVERAGED = r"(^|_)ema|ema(_|$)|(^|_)swa(_|$)|shadow|averag|polyak"
ROLES = {  # what a segment of a network's prefix says of it
    "ema": AVERAGED,
    "student": "student",
    "teacher": "teacher",
    "query": "encoder_q|query(?!_embed)",
    "key": r"encoder_k|key_encoder",
    "online": "online",
    "target": "target",
    "base": "base_encoder",
    "momentum": "momentum",
}


@dataclass(frozen=True)
class Method:
    """A self-supervised method whose file holds two networks of which its authors evaluate one.

    `evaluated` and `other` match the two prefixes; `mark` matches a key that no other file has.
    """

    name: str
    evaluated: str
    other: str
    mark: str = ""


METHODS = (
    Method("MoCo", r"\bencoder_q\.", r"\bencoder_k\."),  # facebookresearch/moco, main_lincls.py
    Method(
        "MoCo v3", r"\bbase_encoder\.", r"\bmomentum_encoder\."
    ),  # facebookresearch/moco-v3, main_lincls.py
    Method(
        "BYOL", r"\bonline_(encoder|net)", r"\btarget_(encoder|net)"
    ),  # the paper's sec. 3.1; byol-pytorch
    # facebookresearch/dino, eval_linear.py: --checkpoint_key teacher; its head alone ends in last_layer
    Method("DINO", r"^teacher\.", r"^student\.", r"^student\..*\bhead\.last_layer\."),
    # vturrisi/solo-learn, main_linear.py
    Method("solo-learn", r"\bbackbone\.$", r"\bmomentum_backbone\.$", r"\b(momentum_)?projector\."),
    # lightly's benchmarks
    Method("lightly", r"\bbackbone\.$", r"\bbackbone_momentum\.$", r"\bprojection_head"),
)


def choose(
    bodies: dict[str, dict[str, Tensor]], tensors: dict[str, Tensor], spec: str, weights: str | None
) -> tuple[str, list[str], list[str]]:
    """(prefix of the network to take, prefixes of other networks, notes). `bodies` are the networks' tensors by prefix.

    `weights` is a role (one of `ROLES`, or raw: what is no average) or a prefix. Without it one network is taken as it
    is, so are several of the same weights, and so is the one that the authors of a file's method evaluate. Raises
    UserError with the choice otherwise.
    """
    groups = _equal(bodies)
    names = [group[0] for group in groups]
    roles = {prefix: _roles(prefix, tensors, len(bodies)) for prefix in bodies}
    unnamed = _unnamed_averages(bodies, tensors)
    offer = _offer(groups, roles, spec)
    if weights is not None:
        fitting = [g[0] for g in groups if any(weights.strip(".") in (p.strip("."), shown(p)) for p in g)]
        fitting = fitting or [g[0] for g in groups if any(weights in roles[p] for p in g)]
        if len(fitting) != 1:
            what = f"{len(fitting)} networks" if fitting else "no network"
            raise UserError(f"{spec}: --weights {weights} names {what} in it; {offer}")
        taken, why = fitting[0], "as asked for"
    elif len(groups) > 1:
        taken, why = _evaluated(groups, bodies, tensors)
        if taken is None:
            raise UserError(f"{spec}: holds {len(groups)} networks of different weights; {offer}")
    else:
        taken, why = names[0], ""
        if unnamed:
            raise UserError(
                f"{spec}: holds a second set of averaged weights under names that cannot be read ({unnamed[0]} …); "
                f"say --weights {shown(taken)} to take those under {_called(taken)}"
            )
    others = [name for name in names if name != taken]
    group = next(g for g in groups if taken in g)
    notes = [f"the same weights also stand under {', '.join(map(_called, group[1:]))}"] if group[1:] else []
    if others:
        notes.append(f"took {_called(taken)}, not {', '.join(map(_called, others))}: {why}")
    return taken, [p for p in bodies if p not in group], notes


def display(name: str) -> str:
    """A key or prefix as it is shown: that it stands in a file's `state_dict` goes without saying."""
    return name.removeprefix("state_dict.")


def shown(prefix: str) -> str:
    """A prefix as `--weights` takes it; "raw" for none."""
    return display(prefix).strip(".") or "raw"


def root(prefix: str, taken: str) -> str:
    """The part of a file that belongs to the network of `prefix` and not to the one taken; "" for none."""
    parts, own = prefix.split(".")[:-1], taken.split(".")[:-1]
    common = 0
    while common < min(len(parts), len(own)) and parts[common] == own[common]:
        common += 1
    return "".join(part + "." for part in parts[: common + 1]) if common < len(parts) else ""


def _called(prefix: str) -> str:
    return repr(display(prefix)) if display(prefix) else "no prefix"


def _equal(bodies: dict[str, dict[str, Tensor]]) -> list[list[str]]:
    groups: list[list[str]] = []
    for prefix, body in bodies.items():
        for group in groups:
            other = bodies[group[0]]
            if body.keys() == other.keys() and all(_same(body[k], other[k]) for k in body):
                group.append(prefix)
                break
        else:
            groups.append([prefix])
    return groups


def _same(a: Tensor, b: Tensor) -> bool:
    dense = not any(t.is_sparse or t.is_quantized for t in (a, b))
    return dense and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _roles(prefix: str, tensors: dict[str, Tensor], count: int) -> set[str]:
    segments = prefix.lower().split(".")
    found = {role for role, pattern in ROLES.items() if any(re.search(pattern, s) for s in segments)}
    # mmengine's EMAHook and Lightning's WeightAveraging swap the two when they save
    if count > 1 and "ema_state_dict.steps" in tensors:
        found ^= {"ema"}
    elif any(k.startswith("averaging_state.") for k in tensors) and not prefix.startswith(
        "current_model_state."
    ):
        found |= {"ema"}
    return found if "ema" in found else found | {"raw"}


def _unnamed_averages(bodies: dict[str, dict[str, Tensor]], tensors: dict[str, Tensor]) -> list[str]:
    """Keys of averages whose names are written without dots (mmcv's `ema_layer1_0_conv1_weight`)."""
    roots = [p for p in bodies if p]
    return [
        k
        for k, v in tensors.items()
        if not k.startswith(tuple(roots)) and v.ndim == 4 and re.search(AVERAGED, k.lower().replace(".", "_"))
    ]


def _evaluated(groups, bodies, tensors) -> tuple[str | None, str]:
    for method in METHODS:
        if method.mark and not any(re.search(method.mark, k) for k in tensors):
            continue
        taken = [g[0] for g in groups if any(re.search(method.evaluated, p) for p in g)]
        others = [g for g in groups if any(re.search(method.other, p) for p in g)]
        if len(taken) == 1 and len(groups) == 2 and len(others) == 1 and taken[0] != others[0][0]:
            one, two = bodies[taken[0]], bodies[others[0][0]]
            if {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}:
                return taken[0], f"{method.name}'s authors evaluate it"
    return None, ""


def _offer(groups: list[list[str]], roles: dict[str, set[str]], spec: str) -> str:
    """What `--weights` may be, a line."""
    words = [set().union(*(roles[p] for p in group)) for group in groups]
    options = []
    for group, own in zip(groups, words):
        alone = [w for w in (*ROLES, "raw") if w in own and sum(w in other for other in words) == 1]
        options.append(f"{alone[0] if alone else shown(group[0])} ({_called(group[0])})")
    if len(options) == 1:
        return f"it holds one ({_called(groups[0][0])})"
    return f"say --weights {' or '.join(options)}; in a grid FILE#{options[0].split(' ')[0]}"
