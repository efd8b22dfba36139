"""One `IPluginV3` and one `IPluginCreatorV3One` for every operator, driven by its `OpSpec`. Glue only, no mathematics.

The same classes serve TensorRT and TensorRT-RTX; they are made for the module that `library.load` returns, because
their bases live there. Shapes, types and aliases come from the spec, scratch memory from the launch plans of the
kernels, and work is done by a launcher (see `launch`).

While an engine is built a plugin does no work. There is one way to run it, so nothing depends on how long it takes, and
its kernels are not compiled yet; TensorRT may call it all the same, on made-up inputs and perhaps while it captures its
stream, and takes a failure there for an operator that cannot run at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from seekforge.common.dtypes import TENSORRT
from seekforge.common.errors import EngineError
from seekforge.plugins.kernels.index import NO_KERNELS, Launcher, LauncherSource
from seekforge.plugins.kernels.launch_plan import workspace_bytes
from seekforge.plugins.kernels.sm_limits import SMS
from seekforge.plugins.operator import DOMAIN, STORED_FP8, TYPE_VARIABLES, OpSpec
from seekforge.plugins.registry import SPECS

#: What a plugin carries beside the attributes of its spec: the precision of its matrix products, the digest of its
#: kernels, and the version of the contract that it was built by.
PRODUCTS, KERNEL_DIGEST, OP_VERSION = "products", "kernel_digest", "op_version"
_EXTRA: Final[dict[str, int | str]] = {PRODUCTS: "", KERNEL_DIGEST: NO_KERNELS, OP_VERSION: 0}
_EMPTY: Final[dict[str, int | float | str]] = {"int": 0, "bool": 0, "float": 0.0, "str": ""}


@dataclass(frozen=True)
class Registration:
    """What the registry holds for one module; must stay alive as long as the registry may call it.

    Attributes:
        creators: one per operator.
        made: op_type -> plugins that a creator made so far, in any phase.
        sources: where launchers come from; empty while an engine is built.
        sms: SMs on which the engine that is built shall run.
        workspaces: op_type -> the most scratch that a plugin asked for while an engine was built.
        failures: what went wrong inside a callback. TensorRT only reports that one failed.
    """

    creators: list[Any]
    made: dict[str, int]
    sources: list[LauncherSource] = field(default_factory=list)
    sms: list[int] = field(default_factory=list)
    workspaces: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


_REGISTERED: dict[str, Registration] = {}


def register(trt: Any, source: LauncherSource | None = None, *, sms: Collection[int] = SMS) -> Registration:
    """Register every operator's creator in namespace `seekforge`; once per process and module.

    Args:
        trt: a module from `library.load`.
        source: gives the kernels of the engine that is about to be deserialized; None to build.
        sms: SMs on which the engine that is about to be built shall run, none: any; scratch is enough for each of them.

    Raises:
        EngineError: another library has registered plugins of these names.
    """
    registration = _REGISTERED.get(trt.__name__)
    if registration is None:
        registration = _REGISTERED[trt.__name__] = _register(trt)
    registration.sources[:] = [] if source is None else [source]
    registration.sms[:] = sms or SMS
    registration.workspaces.clear()
    return registration


def _register(trt: Any) -> Registration:
    registration = Registration([], dict.fromkeys(SPECS, 0))
    classes = {aliased: _plugin_class(trt, registration, aliased=aliased) for aliased in (False, True)}
    creator = _creator_class(trt, registration, classes)
    for one in map(creator, SPECS.values()):
        if not trt.get_plugin_registry().register_creator(one, DOMAIN):
            raise EngineError(f"plugin {DOMAIN}::{one.name} is registered already, by another library; unload it")
        registration.creators.append(one)
    return registration


def _creator_class(trt: Any, registration: Registration, classes: Mapping[bool, Any]) -> Callable[[OpSpec], Any]:
    class Creator(trt.IPluginCreatorV3One):
        def __init__(self, spec: OpSpec) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.spec = spec
            self.name, self.plugin_namespace, self.plugin_version = spec.name, DOMAIN, "1"
            known = {attr.name: _EMPTY[attr.kind] for attr in spec.attrs} | _EXTRA
            # only attributes that are named here reach create_plugin
            self.field_names, self._kept = make_fields(trt, known)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            try:
                values = read_fields(self.spec, fields)
                runs = phase == trt.TensorRTPhase.RUNTIME
                launcher = _find_launcher(self.spec, values, registration.sources) if runs else None
                plugin = classes[bool(self.spec.aliases)](self.spec, values, launcher, runs=runs)
            except Exception as error:
                registration.failures.append(f"{name or self.spec.name}: {error}")
                raise
            registration.made[self.spec.name] += 1
            return plugin

    return Creator


def _find_launcher(spec: OpSpec, values: Mapping[str, Any], sources: Sequence[LauncherSource]) -> Launcher:
    if values[OP_VERSION] not in (0, spec.version):  # 0: a node that nobody prepared
        raise EngineError(
            f"{spec.name}: the engine was built for version {values[OP_VERSION]} of the operator, this seekforge has "
            f"version {spec.version}; build the engine again"
        )
    if not sources:
        raise EngineError(f"{spec.name}: no kernels were given; open the engine with seekforge")
    attrs = {attr.name: values[attr.name] for attr in spec.attrs}
    return sources[0].launcher(spec.name, attrs=attrs, products=values[PRODUCTS], digest=values[KERNEL_DIGEST])


def read_fields(spec: OpSpec, fields: Any) -> dict[str, Any]:
    """Return attribute values from plugin fields: strings without their NUL, bools as bools, extras defaulted.

    Raises:
        ShapeError: an attribute is missing or has a value that the spec does not allow.
    """
    kinds = {attr.name: attr.kind for attr in spec.attrs}
    values: dict[str, Any] = dict(_EXTRA)
    for one in fields:
        kind = kinds.get(one.name) or ("str" if isinstance(_EXTRA.get(one.name), str) else "int")
        if one.name not in kinds and one.name not in _EXTRA:
            continue
        raw = np.asarray(one.data)
        if kind == "str":
            values[one.name] = raw.tobytes().partition(b"\0")[0].decode()
        elif kind == "float":
            values[one.name] = float(raw.flat[0])
        else:
            values[one.name] = bool(raw.flat[0]) if kind == "bool" else int(raw.flat[0])
    spec.check_attrs({name: value for name, value in values.items() if name not in _EXTRA})
    return values


def make_fields(trt: Any, values: Mapping[str, int | float | str]) -> tuple[Any, list[Any]]:
    """Return a PluginFieldCollection, and the data in it: a field only points there, so it must be kept as long."""
    fields, data = [], []
    for name, value in values.items():
        if isinstance(value, str):
            data.append(np.frombuffer(value.encode() + b"\0", np.int8))
            kind = trt.PluginFieldType.CHAR
        elif isinstance(value, float):
            data.append(np.array([value], np.float32))
            kind = trt.PluginFieldType.FLOAT32
        else:
            data.append(np.array([value], np.int32))
            kind = trt.PluginFieldType.INT32
        fields.append(trt.PluginField(name, data[-1], kind))
    return trt.PluginFieldCollection(fields), [data, fields]


def _plugin_class(trt: Any, registration: Registration, *, aliased: bool) -> Any:
    bases = (
        trt.IPluginV3,
        trt.IPluginV3OneCore,
        trt.IPluginV3OneBuildV2 if aliased else trt.IPluginV3OneBuild,
        trt.IPluginV3OneRuntime,
    )
    names = {getattr(trt.DataType, name): dtype for dtype, name in TENSORRT.items()}
    failures = registration.failures

    class Plugin(*bases):
        """An operator inside an engine; `runs` says that the engine is used, not built."""

        def __init__(self, spec: OpSpec, values: dict[str, Any], launcher: Launcher | None, *, runs: bool) -> None:
            for base in bases:  # the bindings want each base initialized by hand
                base.__init__(self)
            self.spec, self.values, self.launcher, self.runs = spec, values, launcher, runs
            self.attrs = {attr.name: values[attr.name] for attr in spec.attrs}
            self.plugin_name, self.plugin_namespace, self.plugin_version = spec.name, DOMAIN, "1"
            self.num_outputs = len(spec.outputs)
            self._fields, self._kept = make_fields(trt, values)
            self._reported = _Reported(spec.name, failures)

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.spec, dict(self.values), self.launcher, runs=self.runs)

        def get_fields_to_serialize(self) -> Any:
            return self._fields

        # --- build ---

        def get_output_data_types(self, input_types: Any) -> list[Any]:
            with _Reported(self.spec.name, failures):
                dtypes = self.spec.named([names.get(t, str(t)) for t in input_types])
                return [getattr(trt.DataType, TENSORRT[dtype]) for dtype in self.spec.output_dtypes(dtypes)]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
            with _Reported(self.spec.name, failures):
                symbols = [[_size(trt, builder, dims[i]) for i in range(len(dims))] for dims in inputs]
                results = []
                for shape in self.spec.output_shapes(self.spec.bind(symbols, self.attrs)):
                    dims = trt.DimsExprs(len(shape))
                    for i, size in enumerate(shape):
                        dims[i] = size.expr if isinstance(size, Symbol) else builder.constant(size)
                    results.append(dims)
                return results

        def supports_format_combination(self, pos: int, in_out: Any, num_inputs: int) -> bool:
            described = in_out[pos].desc
            if described.format != trt.TensorFormat.LINEAR or described.type not in names:
                return False
            types = [names.get(in_out[i].desc.type, "") for i in range(min(pos + 1, num_inputs))]
            return allowed(self.spec, types, pos, num_inputs, names[described.type])

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            with _Reported(self.spec.name, failures):
                shapes = [tuple(one.max) for one in inputs]
                if self.launcher is not None:
                    return self.launcher.workspace_bytes(shapes)
                size = workspace_bytes(self.spec.name, shapes, self.attrs, registration.sms)
                workspaces = registration.workspaces
                workspaces[self.spec.name] = max(size, workspaces.get(self.spec.name, 0))
                return size

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass  # shapes are read where they are used

        def get_valid_tactics(self) -> list[int]:
            return []  # beside the one that there always is: nothing to choose by time

        # --- run ---

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def set_tactic(self, tactic: int) -> None:
            pass

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def enqueue(
            self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: int, stream: int
        ) -> None:
            if not self.runs:
                return
            with self._reported:
                if self.launcher is None:
                    raise EngineError(
                        f"{self.spec.name}: no kernels were found for this GPU; open the engine with seekforge"
                    )
                # a slice of `Dims` is a tuple at once; a tuple of it takes five times as long, an exception for its end
                shapes = [one.dims[:] for one in input_desc]
                self.launcher.enqueue(shapes, inputs, outputs, workspace, stream)

    if aliased:

        def get_aliased_input(self: Any, output_index: int) -> int:
            outputs = {arg.name: i for i, arg in enumerate(self.spec.outputs)}
            inputs = {arg.name: i for i, arg in enumerate(self.spec.inputs)}
            pairs = {outputs[out]: inputs[into] for out, into in self.spec.aliases}
            return pairs.get(output_index, -1)

        Plugin.get_aliased_input = get_aliased_input
    return Plugin


class _Reported:
    """Keep what went wrong in a callback: TensorRT prints a traceback and says only that the plugin failed."""

    def __init__(self, name: str, failures: list[str]) -> None:
        self.name, self.failures = name, failures

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.failures.append(str(error) if self.name in str(error) else f"{self.name}: {error}")


def allowed(spec: OpSpec, input_types: Sequence[str], pos: int, num_inputs: int, dtype: str) -> bool:
    """Return whether tensor `pos` of an operator may have a type.

    Args:
        spec: the operator.
        input_types: types of the inputs up to `pos`, or of all of them for an output.
        pos: number of the tensor; inputs come first, then outputs.
        num_inputs: how many of them are inputs.
        dtype: the type.
    """
    variables: dict[str, str] = {}
    for arg, input_type in zip(spec.all_inputs, input_types, strict=False):
        possible = STORED_FP8 if arg.dtype == "fp8" else TYPE_VARIABLES.get(arg.dtype, (arg.dtype,))
        if input_type not in possible or variables.setdefault(arg.dtype, input_type) != input_type:
            return False
    if pos < num_inputs:
        return True
    out = spec.outputs[pos - num_inputs]
    return dtype == variables.get(out.dtype, out.dtype)


class Symbol:
    """A size that is known only at run time, with the arithmetic that shape expressions use."""

    def __init__(self, trt: Any, builder: Any, expr: Any) -> None:
        self._trt, self._builder, self.expr = trt, builder, expr

    def _with(self, operation: str, other: Any) -> Symbol:
        right = other.expr if isinstance(other, Symbol) else self._builder.constant(other)
        kind = getattr(self._trt.DimensionOperation, operation)
        return Symbol(self._trt, self._builder, self._builder.operation(kind, self.expr, right))

    def __add__(self, other: Any) -> Symbol:
        return self._with("SUM", other)

    def __mul__(self, other: Any) -> Symbol:
        return self._with("PROD", other)

    def __floordiv__(self, other: Any) -> Symbol:
        return self._with("FLOOR_DIV", other)

    __radd__, __rmul__ = __add__, __mul__


def _size(trt: Any, builder: Any, expr: Any) -> Any:
    """Return a size as an int where it is constant, so that the contract is checked while the engine is built."""
    return expr.get_constant_value() if expr.is_constant() else Symbol(trt, builder, expr)
