"""`jaxfabric bench`: our engine beside the floors and the peers, in one run.

Each subject runs in processes of its own. Those of a peer may use an interpreter
without jaxfabric, so the modules that they load (`child`, `case`, `ends`) import
each other relatively and need numpy alone.
"""
