"""What `otpo eval` is made of: lm-eval's run, intervals of its scores, the table; and our tasks in lm-eval's form."""
