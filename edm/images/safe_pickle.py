"""Reading foreign pickles without executing anything in them."""

import pickle
from collections.abc import Callable, Sized
from typing import Any, NoReturn

from edm.images.foreign import Budget
from toy.files import UserError

STEPS = 2**19  # for one pickle: opcodes, and what calls copy; a name costs a thousand


class Record:
    """Stands for a class or function, and a call of it: keeps what it is given, and does nothing."""

    args, state = (), None

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):  # else pickle writes the state's entries over our attributes
        self.state = state


class Opaque:
    """Of values that the file's own values may be keys, or in words: hashed and shown without a look inside.

    A tuple that holds another twice, that again another, and so on for a hundred bytes, is hashed and
    printed for ever; numbers beyond 64 bits can be made to have all the same hash.
    """

    __slots__ = ()
    __hash__ = object.__hash__

    def __repr__(self):
        return "..."


TWINS = {
    tuple: type("Tuple", (Opaque, tuple), {"__slots__": ()}),
    frozenset: type("Frozen", (Opaque, frozenset), {"__slots__": ()}),
    int: lambda number: LONG(number) if number.bit_length() > 32 else number,
}
LONG = type("Long", (Opaque, int), {"__slots__": ()})
HOLDERS = (tuple, list, dict, set, frozenset)
NAMES = {pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.INST}
COPIED = {pickle.REDUCE: 1, pickle.NEWOBJ: 1, pickle.NEWOBJ_EX: 2, pickle.BINPERSID: 1}  # from the stack


def metered(opcode: bytes, run: Callable) -> Callable:
    """The opcode's function, which pays first, and whose result is an Opaque one."""
    price, copied = 1000 if opcode in NAMES else 1, COPIED.get(opcode, 0)

    def step(self):
        self.budget.spend(price)
        for arguments in self.stack[-copied:] if copied else ():
            if isinstance(arguments, Sized):
                self.budget.spend(len(arguments))
                self.budget.spend(sum(len(x) for x in arguments if isinstance(x, HOLDERS)))
        run(self)
        if self.stack and (twin := TWINS.get(type(self.stack[-1]))):
            self.stack[-1] = twin(self.stack[-1])

    return step


METERED = {code: metered(bytes([code]), run) for code, run in pickle._Unpickler.dispatch.items()}
del METERED[pickle.BYTEARRAY8[0]]  # it allocates whatever length a damaged file declares


class InertUnpickler(pickle._Unpickler):
    """An unpickler that knows only the (module, name) pairs of a table, each with our stand-in.

    Exact pairs, never a lookup: under protocol 4 a dotted name walks from an innocent module to any
    function.  The stand-ins must themselves be harmless to call with anything.  This is Python's own
    unpickler in Python, not the one in C, which allocates whatever a damaged memo index asks for.
    """

    dispatch = METERED

    def __init__(self, file: Any, table: dict[tuple, Any], **how):
        super().__init__(file, **how)
        self.table = table
        self.budget = Budget(STEPS, f"a pickle of more than {STEPS:,} steps, with names for a thousand each")

    def load(self) -> Any:
        """UserError, without the file's name, whatever is wrong with it."""
        try:
            return super().load()
        except UserError:
            raise
        except Exception as error:  # damaged bytes can raise nearly anything
            words = f"{type(error).__name__}: {str(error)[:100]}"
            raise UserError(f"not a readable pickle ({words})") from None

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.table:
            raise UserError(f"it asks for {f'{module}.{name}'[:100]}, which is not allowed")
        return self.table[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise UserError("it has persistent ids, which are not allowed")

    def get_extension(self, code: int) -> NoReturn:
        raise UserError("it uses the extension registry, which is not allowed")
