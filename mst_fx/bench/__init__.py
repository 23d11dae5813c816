"""``mst-fx bench``: mst and its peers on the same work, every cell a process of its own.

Terms:
    question: what is asked, ``head``, ``mlp``, ``model``, ``length`` or ``compile``.
    work: what every system does for it (``works``).
    system: a way to do the work (``systems``); one that can't is a row that says why.
    cell: one system at one size, measured once (``cell``).
    turns: step times of several systems in one process, one step each in turn (``turns``).
"""
