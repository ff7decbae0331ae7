"""A laboratory of links: devices that are joined by a network of a chosen speed, on one machine.

Each device is a process in a network namespace of its own. Its only way out is a link whose speed
the kernel limits and whose bytes the kernel counts, so what is measured is what a network of that
speed would carry; what is computed still shares the cores of this machine.
"""
