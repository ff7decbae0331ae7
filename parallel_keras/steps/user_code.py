"""What code of the user's reads, and whether it does no more than compute with it."""

from __future__ import annotations

import builtins
import dis
import functools
import types
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Functions that always do the same, and nothing else.
_PURE = _words(
    "abs all any bool complex dict divmod enumerate filter float frozenset getattr hasattr int "
    "isinstance issubclass len list map max min pow range reversed round set slice sorted str "
    "sum super tuple type zip"
)
# What leaves something behind, or may: it must happen at each call.
_EFFECTS = _words(
    "DELETE_ATTR DELETE_GLOBAL DELETE_SUBSCR IMPORT_FROM IMPORT_NAME LOAD_BUILD_CLASS STORE_ATTR "
    "STORE_GLOBAL STORE_SLICE STORE_SUBSCR"
)
_CHANGES = _words(
    "add append appendleft clear discard extend insert pop popitem popleft remove reverse "
    "setattr setdefault sort update write"
)
# What their modules do is known, or an operation of the graph.
_PACKAGES = frozenset({"keras", "math", "numpy", "tensorflow"})
# Called when a model is made, built, saved or trained, and not in a call.
_NOT_IN_A_CALL = _words(
    "__init__ __new__ build build_from_config compile compile_from_config compute_loss "
    "compute_metrics compute_output_shape compute_output_spec evaluate fit from_config "
    "get_build_config get_compile_config get_config load_own_variables make_predict_function "
    "make_test_function make_train_function metrics predict predict_on_batch predict_step "
    "reset_metrics save_own_variables test_on_batch test_step train_on_batch train_step"
)
# What Keras keeps of how objects were made, built and compiled, and no `call` of its layers reads.
PASSED_OVER = _words(
    "_called _compile_config _compile_loss _compile_metrics _compiled_trainable_state "
    "_distribute_strategy _auto_config _inbound_nodes _lock _loss_ids _loss_tracker _losses "
    "_losses_override _outbound_nodes _tracker build history loss optimizer predict_function "
    "quantize stop_training test_function train_function"
)
_OF_EVERY_CLASS = _words(
    "__annotations__ __dataclass_fields__ __dataclass_params__ __dict__ __doc__ __eq__ "
    "__firstlineno__ __hash__ __match_args__ __module__ __orig_bases__ __parameters__ "
    "__post_init__ __qualname__ __replace__ __repr__ __slots__ __static_attributes__ __str__ "
    "__weakref__"
)


def read_by_function(function: types.FunctionType) -> list[Any] | None:
    """What a function reads besides its arguments.

    Args:
        function: Function of the user's.

    Returns:
        Values of globals, of variables around it, and of defaults; `None` if it may do more than
        compute with them.
    """
    names = _names(function.__code__)
    if names is None:
        return None
    found: list[Any] = [function.__code__, *(function.__defaults__ or ())]
    found += (function.__kwdefaults__ or {}).values()
    for name in names:
        if name in function.__globals__:
            value = function.__globals__[name]
            if not _is_known(value):
                return None
            found.append(value)
        elif name not in _PURE and not _is_error(name):
            return None
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    try:
        # With `super()`, a method has the class that it is of.
        return [*found, *(cell.cell_contents for name, cell in cells if name != "__class__")]
    except ValueError:  # One is not filled yet.
        return None


def held_by_class(of: type) -> list[Any]:
    """What a class of the user's, and those that it inherits from, hold that counts in a call.

    Args:
        of: The class.

    Returns:
        Values, functions among them.
    """
    bases = [base for base in of.__mro__ if base is not object and not is_of_packages(base)]
    return [
        value
        for base in bases
        for name, value in vars(base).items()
        if name not in _OF_EVERY_CLASS and name not in _NOT_IN_A_CALL
    ]


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...] | None:
    """The globals that code names, that inside of it included; `None` if it changes something."""
    found: dict[str, None] = {}
    attributes = set()
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in _EFFECTS:
            return None
        if instruction.opname == "STORE_DEREF" and name not in code.co_cellvars:
            return None
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found[name] = None
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            attributes.add(name)
    # What `getattr` is asked for. Of NumPy, others come at each call.
    attributes.update(value for value in code.co_consts if isinstance(value, str))
    if attributes & (_CHANGES | _NOT_IN_A_CALL | PASSED_OVER | {"random"}):
        return None
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names = _names(inner)
            if names is None:
                return None
            found.update(dict.fromkeys(names))
    return tuple(found)


def _is_known(value: Any) -> bool:
    """Whether a global may be used: what is called must do no more than compute."""
    if isinstance(value, types.ModuleType):
        return _is_package(value.__name__) and not value.__name__.startswith("numpy.random")
    return is_of_packages(value) if isinstance(value, types.BuiltinFunctionType) else True


def is_of_packages(thing: Any) -> bool:
    """Whether a class or function is of a package that is known to do no more than compute.

    Args:
        thing: A class or function.
    """
    return _is_package(str(thing.__module__))


def _is_package(module: str) -> bool:
    return module.partition(".")[0] in _PACKAGES


def _is_error(name: str) -> bool:
    value = getattr(builtins, name, None)
    return isinstance(value, type) and issubclass(value, BaseException)
