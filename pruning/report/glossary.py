"""The words that a report uses and a newcomer may not know; headers of tables link to them."""

GLOSSARY = {
    "channel": "One of the intermediate units of an expert: a row of its gate and up projections "
    "and the column of its down projection that goes with them. What is removed or kept.",
    "nats/token": "How surprised the model is by the next token, as the mean negative natural "
    "logarithm of its probability. Lower is better.",
    "+nats": "Nats per token above the dense model: what compression costs. 0.05 more make the "
    "perplexity 5% larger.",
    "perplexity": "e to the power of the nats per token: among how many equally likely tokens the "
    "model hesitates, as it were. Lower is better.",
    "÷ random": "What pruning adds to the loss, divided by what the removal of equally many "
    "channels at random adds. Below 1 the choice of channels helps; near 1 it does not.",
    "KL": "Kullback-Leibler divergence of the dense model's predictions from this model's, nats "
    "per token. 0 if both always predict alike.",
    "top-1": "How often this model and the dense one find the same token most likely.",
    "bits per parameter": "All bytes of the weight files, scales and headers included, over the "
    "parameters that are left.",
    "nominally": "Times smaller if every parameter took as many bits as the format's name "
    "says; the column before it counts the bytes that are written.",
    "dense": "The model as it was, before anything was removed.",
    "score covered": "Share of the channel score that the kept channels hold.",
    "attribution": "The score of an expert: how much it matters to its layer.",
    "criterion": "The score of a channel: how much it matters to its expert.",
    "planner": "The rule that divides the budget of channels among layers and experts.",
    "ragged, layered, padded": "How exports store experts of different widths: each with its own, "
    "one per layer, or one for the model, filled up with zeros.",
}
