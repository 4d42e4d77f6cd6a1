"""The update rules, one file each: pure functions of counts and of the bias before."""
