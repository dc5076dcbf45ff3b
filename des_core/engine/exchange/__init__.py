"""What crosses the network: the plan, the collectives, and the exchange that joins operators to them."""
