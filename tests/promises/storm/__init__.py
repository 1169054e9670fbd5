"""The storm: everything at once, for as long as one likes, from a seed; then every account is balanced.

    host.py      a process of its own: runtimes one after another, waves of orders, the calm after them
    weather.py   what strikes: kills, stops, recycling, scaling, reloads
    orders.py    what is asked for, by submit, map and asyncio, and which outcomes each may have
    kernels.py   kernels, which run to their end whatever dies
    tasks.py     what runs in the workers, and notes in a ledger on disk that it does
    accounts.py  outcomes against the ledger; blocks, leases, descriptors, processes, threads, files
    slopes.py    whether a series of samples grows

Its bodies are in test_storm.py.
"""
