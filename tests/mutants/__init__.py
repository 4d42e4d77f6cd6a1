"""One-line changes of our code that named tests must catch: the list, and the program that tries it."""
