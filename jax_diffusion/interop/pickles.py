"""Reads the pickles inside PyTorch's files, without `pickle`, and runs nothing of them.

A pickle is a program for a small stack machine, whose instructions can import and call
anything. The machine here has no instruction that imports or calls: a name becomes a
`Global`, which is compared with the few names that tensors need, and whatever else is
made of a name becomes an `Object` without content. So no file can run code, and a short
file cannot ask for much memory or time.
"""

import pickletools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

MAX_INSTRUCTIONS = 1_000_000  # a checkpoint needs about 40 for each tensor
MAX_KEY = 2**31  # of integers as keys: chosen larger ones can make a dict very slow
PLAIN_NAMES = {"list", "dict", "set", "int", "float", "str", "tuple", "bool"}
# Names of torch that stand beside tensors and mean nothing for their values.
TORCH_NAMES = {"device", "float", "float16", "float32", "float64", "bfloat16", "half"}
TORCH_NAMES |= {"double", "int8", "int16", "int32", "int64", "uint8", "bool", "long"}


class Global(NamedTuple):
    """A function or class, by its name; nothing is imported."""

    module: str
    name: str


class Object:
    """What a pickle makes with a function or class that has no meaning here."""

    __slots__ = ()


OBJECT = Object()


class Unpickled(NamedTuple):
    """What a pickle describes.

    Attributes:
        tree: dicts, lists, tuples, plain values, what `call` and `persistent` return,
            and `OBJECT` for every object that was left out.
        objects: names of the classes and functions that are left out, sorted.
    """

    tree: Any
    objects: list[str]


def load(
    file: Any,
    call: Callable[[Global, tuple[Any, ...]], Any],
    persistent: Callable[[tuple[Any, ...]], Any],
) -> Unpickled:
    """Reads one pickle from the present place of an open file.

    Args:
        file: an open binary file; it is left behind the pickle.
        call: returns what a known function makes of its arguments; NotImplemented for
            an unknown one. Arguments are as untrusted as the file.
        persistent: returns what stands for a persistent id.

    Raises:
        ValueError: if the pickle is damaged, is too long or has an unknown instruction.
    """
    machine = _Machine(call, persistent)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count == MAX_INSTRUCTIONS:
                raise ValueError(f"a pickle of over {count} instructions")
            machine.step(opcode.name, argument)
        tree = machine.stack[-1]
    except (IndexError, KeyError, AttributeError, TypeError, UnicodeError) as error:
        raise ValueError("a damaged pickle") from error
    return Unpickled(tree, sorted(machine.objects))


CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Instructions that push their argument.
LITERALS = set(
    """
    BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8
    INT LONG LONG4 FLOAT STRING BINSTRING SHORT_BINSTRING UNICODE
    """.split()
)
EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
NOTHING = {"PROTO", "FRAME", "STOP"}


class _Machine:
    """The stack, the memo, and one method for each kind of instruction."""

    def __init__(self, call, persistent):
        self.call, self.persistent = call, persistent
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below the marks
        self.memo: dict[int, Any] = {}
        self.objects: set[str] = set()

    def step(self, name: str, argument: Any) -> None:
        """Follows one instruction."""
        stack = self.stack
        if name in LITERALS:
            stack.append(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.outer.append(stack)
            self.stack = []
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in TUPLES:
            parts = tuple(stack[-TUPLES[name] :])
            if len(parts) != TUPLES[name]:
                raise IndexError
            stack[-len(parts) :] = [parts]
        elif name not in NOTHING:
            method = getattr(self, f"do_{name.lower()}", None)
            if method is None:
                raise ValueError(f"a pickle with the instruction {name}")
            method(argument)

    def pop_mark(self) -> list[Any]:
        """Returns what was pushed since the last mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def pop_pairs(self) -> list[tuple[Any, Any]]:
        """Returns the keys and values that were pushed since the last mark."""
        items = self.pop_mark()
        if len(items) % 2:
            raise IndexError
        return list(zip(items[::2], items[1::2], strict=True))

    def do_pop(self, _):
        self.stack.pop()

    def do_pop_mark(self, _):
        self.pop_mark()

    def do_tuple(self, _):
        items = tuple(self.pop_mark())
        self.stack.append(items)

    def do_list(self, _):
        items = self.pop_mark()
        self.stack.append(items)

    do_frozenset = do_list

    def do_dict(self, _):
        made: dict[Any, Any] = {}
        self.update(made, self.pop_pairs())
        self.stack.append(made)

    def do_dup(self, _):
        self.stack.append(self.stack[-1])

    def do_append(self, _):
        item = self.stack.pop()
        self.extend([item])

    def do_appends(self, _):
        self.extend(self.pop_mark())

    do_additems = do_appends

    def do_setitem(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self.update(self.stack[-1], [(key, value)])

    def do_setitems(self, _):
        pairs = self.pop_pairs()
        self.update(self.stack[-1], pairs)

    def do_global(self, argument):
        module, _, name = argument.partition(" ")
        self.stack.append(Global(module, name))

    def do_stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError
        self.stack.append(Global(module, name))

    def do_reduce(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple):
            raise TypeError
        self.stack.append(self.make(function, arguments))

    do_newobj = do_reduce

    def do_newobj_ex(self, _):
        self.stack.pop()
        self.do_reduce(None)

    def do_build(self, _):
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Global) or not isinstance(state, dict | tuple | Object):
            raise TypeError

    def do_binpersid(self, _):
        pid = self.stack.pop()
        if not isinstance(pid, tuple):
            raise TypeError
        self.stack.append(self.persistent(pid))

    def extend(self, items: list[Any]) -> None:
        """Appends to the list on the stack."""
        target = self.stack[-1]
        if isinstance(target, list):
            target += items
        elif target is not OBJECT:
            raise TypeError

    def update(self, target: Any, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Sets items of a dict, those with simple keys."""
        if target is OBJECT:
            return
        if not isinstance(target, dict):
            raise TypeError
        for key, value in pairs:
            text = key is None or isinstance(key, str)
            small = isinstance(key, int) and abs(key) < MAX_KEY
            decay = isinstance(key, float) and 0 < key < 1  # few of them can collide
            if text or small or decay:
                target[key] = value
            else:
                self.objects.add(f"a {type(key).__name__} as a key")

    def make(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Returns what a function or class makes of its arguments."""
        if not isinstance(function, Global):
            if function is OBJECT:
                return OBJECT
            raise TypeError
        module, name = function
        if module == "collections" and name in ("OrderedDict", "defaultdict"):
            made: dict[Any, Any] = {}
            if name == "OrderedDict" and arguments:
                self.update(made, arguments[0])
            return made
        made = self.call(function, arguments)
        if made is not NotImplemented:
            return made
        plain = module in ("builtins", "__builtin__") and name in PLAIN_NAMES
        if not plain and not (module == "torch" and name in TORCH_NAMES):
            text = f"{module}.{name}"[:80]
            self.objects.add(text if text.isprintable() else "an unprintable name")
        return OBJECT
