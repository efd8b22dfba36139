"""`seekforge serve`: an engine behind the interfaces that chat clients, agents and evaluation harnesses speak.

Two processes: one runs the engine (`engine_process`), the other speaks HTTP (`app`), so that neither takes the other's
time. What they tell each other is in `channel`.
"""
