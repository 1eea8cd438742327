"""Reading foreign pickles without executing anything in them."""

import pickle

from edm.config import UserError


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

    def find_class(self, module, name):
        if (module, name) not in self.table:
            raise UserError(f"it asks for {module}.{name}, which is not allowed")
        return self.table[module, name]

    def persistent_load(self, pid):
        raise UserError("it has persistent ids, which are not allowed")

    def get_extension(self, code):
        raise UserError("it uses the extension registry, which is not allowed")


def load_inert(file, table, kind=InertUnpickler, **how):
    """Unpickle from a binary file.  UserError, without the file's name, whatever is wrong with it."""
    try:
        return kind(file, table, **how).load()
    except UserError:
        raise
    except Exception as error:  # damaged bytes can raise nearly anything
        raise UserError(f"not a readable pickle ({type(error).__name__}: {str(error)[:100]})") from None
