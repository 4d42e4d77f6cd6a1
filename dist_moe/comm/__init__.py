"""Who a worker is, which ranks hold which experts, and the collectives between them."""
