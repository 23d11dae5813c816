"""Row form: what one token's share of a computation is, op by op, and whether it keeps tokens apart."""
