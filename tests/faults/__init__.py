"""The fault campaign: injects faults into runs and checks that they lose nothing."""
