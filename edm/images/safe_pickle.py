"""Reading foreign pickles without executing anything in them."""

import pickle

from toy.files import UserError


class Record:
    """Stands for a class or function, and a call of it: keeps what it is given, and does nothing."""

    args, state = (), None

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):  # else pickle writes the state's entries over our attributes
        self.state = state


class InertUnpickler(pickle._Unpickler):
    """An unpickler that knows only the (module, name) pairs of a table, each with our stand-in.

    Exact pairs, never a lookup: under protocol 4 a dotted name walks from an innocent module to any
    function.  The stand-ins must themselves be harmless to call with anything.  This is Python's own
    unpickler in Python, not the one in C, which allocates whatever a damaged memo index asks for.
    """

    dispatch = pickle._Unpickler.dispatch.copy()
    del dispatch[pickle.BYTEARRAY8[0]]  # it allocates whatever length a damaged file declares

    def __init__(self, file, table, **how):
        super().__init__(file, **how)
        self.table = table

    def load(self):
        """UserError, without the file's name, whatever is wrong with it."""
        try:
            return super().load()
        except UserError:
            raise
        except Exception as error:  # damaged bytes can raise nearly anything
            words = f"{type(error).__name__}: {str(error)[:100]}"
            raise UserError(f"not a readable pickle ({words})") from None

    def find_class(self, module, name):
        if (module, name) not in self.table:
            raise UserError(f"it asks for {module}.{name}, which is not allowed")
        return self.table[module, name]

    def persistent_load(self, pid):
        raise UserError("it has persistent ids, which are not allowed")

    def get_extension(self, code):
        raise UserError("it uses the extension registry, which is not allowed")
