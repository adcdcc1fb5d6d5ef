"""What streams: a model on the meta device, split into blocks, and what of a block is stored and owned by itself.

A block is the unit that is fetched, computed and evicted as a whole: the parameters of one module (a decoder layer, an
embedding, the head), or of several modules that share a tied parameter. The split is a pure function of the module tree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import gcd, prod
from typing import TYPE_CHECKING, Literal

from weightstream.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from torch import nn

Rule = Literal["block", "split", "resident"]
ROOT = "(root)"

PANEL_ELEMENTS = 8 << 20
"""Elements of a tensor from which on it is cut, and of a unit; with AdamW in bf16 a unit has at most 112 MiB."""
PANEL_MULTIPLE = 2048
"""Panels have a multiple of these elements, so that in bf16 and fp32 they lie without gaps, each from a page on."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter tensor as the store sees it: its first name in the model, its shape, whether it is trained.

    A panel has the rows [`row`, `row` + `shape[0]`) of a tensor of `rows` rows; a whole tensor has `rows=None`.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool = True
    row: int = 0
    rows: int | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def __str__(self) -> str:
        return self.name if self.rows is None else f"{self.name}[{self.row}:{self.row + self.shape[0]}]"


@dataclass(frozen=True, slots=True)
class Block:
    """The unit that streams.

    `modules` are the names of the modules whose call needs this block in a slab (more than one where a parameter is
    tied or where small leftovers of a split layer joined). A `resident` block is never evicted: the model's own
    leftovers, such as the final norm.
    """

    index: int
    name: str
    parameters: tuple[Parameter, ...]
    modules: tuple[str, ...]
    resident: bool = False

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def trainable(self) -> bool:
        """Whether any of its parameters is trained; a block that is not streams and nothing else."""
        return any(parameter.trainable for parameter in self.parameters)


@dataclass(frozen=True, slots=True)
class Unit:
    """What is stored, owned, read and written as one record: a small block, or a part of a block.

    `parameters` are whole tensors of the block, or one panel of a tensor that is cut.
    """

    index: int
    block: int
    name: str
    parameters: tuple[Parameter, ...]

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def trainable(self) -> bool:
        """Whether any of its parameters is trained; a unit that is not is never updated."""
        return any(parameter.trainable for parameter in self.parameters)


def cut(blocks: Sequence[Block], *, panel_elements: int = PANEL_ELEMENTS, panels: bool) -> tuple[Unit, ...]:
    """Cuts blocks into units, in order of block: first tensors that stay whole, then the panels of the others.

    The rule does not depend on who owns what, so that norms, updates and files are the same for any number of owners.
    Whole tensors of a block share a unit, in order, until one more would exceed `panel_elements`. A tensor of more
    elements is cut into panels of as many rows as fit, the last one of what is left.

    Args:
        panels: whether tensors may be cut at all (the optimizer treats elements one by one).
    """
    units: list[Unit] = []
    for block in blocks:
        pieces = (
            {parameter.name: _panels(parameter, panel_elements) for parameter in block.parameters} if panels else {}
        )
        members: list[tuple[Parameter, ...]] = []
        group: list[Parameter] = []
        for parameter in block.parameters:
            if len(pieces.get(parameter.name, ())) > 1:
                continue
            if group and sum(p.numel for p in group) + parameter.numel > panel_elements:
                members.append(tuple(group))
                group = []
            group.append(parameter)
        if group:
            members.append(tuple(group))
        members += [(piece,) for found in pieces.values() if len(found) > 1 for piece in found]
        for number, parameters in enumerate(members):
            name = block.name
            if len(members) > 1:
                name = str(parameters[0]) if parameters[0].rows is not None else f"{block.name}/{number}"
            units.append(Unit(len(units), block.index, name, parameters))
    return tuple(units)


def _panels(parameter: Parameter, panel_elements: int) -> list[Parameter]:
    """The row panels of a tensor; the tensor itself if it stays whole."""
    if parameter.numel <= panel_elements or len(parameter.shape) < 2:
        return [parameter]
    rows, width = parameter.shape[0], parameter.numel // parameter.shape[0]
    step = PANEL_MULTIPLE // gcd(width, PANEL_MULTIPLE)
    height = max(step, panel_elements // width // step * step)
    if height >= rows:
        return [parameter]
    return [
        replace(parameter, shape=(min(height, rows - row), *parameter.shape[1:]), row=row, rows=rows)
        for row in range(0, rows, height)
    ]


@dataclass(slots=True)
class _Group:
    """A block in the making: the modules whose parameters stream together."""

    name: str
    modules: list[str]
    parameters: "list[nn.Parameter]"
    resident: bool = False


def split(
    model: "nn.Module",
    *,
    max_block_bytes: int | None = None,
    element_bytes: int = 4,
    rules: Mapping[str, Rule] | None = None,
) -> tuple[Block, ...]:
    """Splits a model, usually on the meta device, into blocks in order of registration.

    An element of a `ModuleList` or `Sequential` is a block (a decoder layer), and so is a leaf with a matrix (an
    embedding, the head). A module above `max_block_bytes` is split into its children; what is left of it joins the
    first block of that layer. What belongs to no layer (the final norm, bare parameters of the model) becomes the root
    block, which stays resident. Modules that share a parameter share a block.

    Args:
        max_block_bytes: bound on the streamed bytes of a block; a leaf is never cut.
        element_bytes: bytes per streamed element (2 for bf16, 4 for fp32).
        rules: `{pattern of module names: "block" | "split" | "resident"}`, first match wins, over the rules above.

    Raises:
        ConfigError: a rule matches no module, or makes a block of a list of modules.
        PlanError: the model has no parameter, or one that is not floating point.
    """
    from torch import nn  # the launcher of ranks knows blocks, and does without torch

    rules = dict(rules or {})
    names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
    if not names:
        raise PlanError(f"the model {type(model).__name__} has no parameter: there is nothing to stream or train")
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise PlanError(f"parameter '{name}' is {parameter.dtype}: expected floating point; make it a buffer")
    unused = set(rules)
    groups: list[_Group] = []
    root = _Group(ROOT, [], [], resident=True)

    def streamed_bytes(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters()) * element_bytes

    def rule_of(name: str) -> Rule | None:
        for pattern, rule in rules.items():
            if fnmatchcase(name, pattern):
                unused.discard(pattern)
                return rule
        return None

    def add(group: _Group, name: str, module: nn.Module) -> None:
        group.modules.append(name)
        group.parameters.extend(module.parameters())

    def walk(name: str, module: nn.Module, repeated: bool, leftovers: list[tuple[str, nn.Module]] | None) -> None:
        if next(module.parameters(), None) is None:
            return
        rule = rule_of(name)
        children = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
        inner = [child for _, child in children if next(child.parameters(), None) is not None]
        container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        leaf = not inner
        fits = max_block_bytes is None or streamed_bytes(module) <= max_block_bytes
        if rule == "resident":
            add(root, name, module)
            return
        inside = leftovers is not None  # of a layer that is being split
        if leaf and not container and rule is None and not repeated:
            # a norm, a router: too small to be worth a trip of its own
            small = inside and max_block_bytes is not None and streamed_bytes(module) * 64 <= max_block_bytes
            if small or all(parameter.ndim < 2 for parameter in module.parameters()):
                if leftovers is not None:
                    leftovers.append((name, module))
                else:
                    add(root, name, module)
                return
        if container and rule == "block":
            raise ConfigError(
                f"block rule for '{name}': a {type(module).__name__} is never called itself, so it cannot stream as one "
                f"block; give the rule for its elements ('{name}.*') or for the module that calls them"
            )
        if not container and (rule == "block" or (rule != "split" and (leaf or (fits and (repeated or inside))))):
            group = _Group(name, [], [])
            add(group, name, module)
            groups.append(group)
            return
        root.parameters.extend(module.parameters(recurse=False))
        repeats = container or isinstance(module, nn.Sequential)
        is_layer = repeated and not container
        rest: list[tuple[str, nn.Module]] | None = [] if is_layer else leftovers
        first = len(groups)
        for child_name, child in children:
            walk(child_name, child, repeats, rest)
        if is_layer and rest:
            target = groups[first] if len(groups) > first else root
            for left_name, left_module in rest:
                add(target, left_name, left_module)

    walk("", model, False, None)
    if unused:
        raise ConfigError(f"block rule {sorted(unused)[0]!r} matches no module of the model; see `weightstream plan`")
    if root.parameters:
        groups.insert(0, root)
    groups = _merge_tied(groups)
    if all(group.resident for group in groups):
        raise PlanError(
            f"nothing of the model {type(model).__name__} streams: all of it is resident, by "
            f"{'its block_rules' if rules else 'having no matrix'}; "
            f"{'leave a layer out of them' if rules else 'train it without weightstream'}"
        )
    return _blocks(model, groups, names)


def _merge_tied(groups: list[_Group]) -> list[_Group]:
    """Joins groups that share a parameter, so that it streams with one record and is updated once."""
    merged: list[_Group] = []
    owner: dict[int, _Group] = {}
    for group in groups:
        sharing = {id(owner[id(p)]): owner[id(p)] for p in group.parameters if id(p) in owner}
        target, *others = [*sharing.values(), group]
        for other in others:
            target.modules.extend(other.modules)
            target.parameters.extend(other.parameters)
            target.resident |= other.resident
            if other in merged:
                merged.remove(other)
        if not sharing:
            merged.append(target)
        for parameter in target.parameters:
            owner[id(parameter)] = target
    return merged


def _blocks(model: "nn.Module", groups: list[_Group], names: dict[int, str]) -> tuple[Block, ...]:
    order = {name: position for position, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    blocks = []
    for index, group in enumerate(groups):
        unique = {id(parameter): parameter for parameter in group.parameters}
        parameters = tuple(
            Parameter(names[key], tuple(parameter.shape), parameter.requires_grad) for key, parameter in unique.items()
        )
        modules = tuple(sorted(set(group.modules), key=order.__getitem__))
        blocks.append(Block(index, group.name, parameters, modules, group.resident))
    return tuple(blocks)


def call_order(model: "nn.Module", blocks: tuple[Block, ...]) -> tuple[tuple[int, str], ...]:
    """The first guess of a forward pass, `(block index, module name)` in order of registration.

    Right for most models; where it is not, the first step finds out and later steps are planned from what it saw.
    """
    block_of = {module: block.index for block in blocks if not block.resident for module in block.modules}
    return tuple((block_of[name], name) for name, _ in model.named_modules(remove_duplicate=False) if name in block_of)
