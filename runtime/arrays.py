REDUCERS = {}


def register(kind, reduce):
    import copyreg

    copyreg.dispatch_table[kind] = reduce
