"""What a user could pick instead: the same models on one core and on two devices, elsewhere too.

Every framework has an environment of its own, and every contender a process of its own. All take
turns in one run. Numbers are compared within a framework first: one core, two devices, the ratio.
"""
