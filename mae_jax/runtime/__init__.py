"""Processes and devices: sharding, discovery, peers, signals, the watchdog, the ends of a process."""
