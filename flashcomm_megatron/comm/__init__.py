"""How bytes move between the ranks of a process group. Knows no codec and no policy, and prints nothing."""
