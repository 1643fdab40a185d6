"""What approximates softmax attention, held against it on the same q, k, v: `python -m benchmarks.approximation`.

    --workdir=runs/demo [--layer=1]   q, k and v of a trained transformer, beside Gaussian ones; a run such as
                                      `make demo DEMO=transformer:tiny` leaves. q and k are read as the layer compares
                                      them, behind rotary positions and norms
    --table                           Markdown of what is kept; nothing runs
    --quick                           a small part, to see that it runs; not kept

Everything stands in for softmax as it is: nothing is trained to do so. The error of a head's outputs is |o - softmax's
o| / |softmax's o|, the median over 3 sequences, where the family's own mixer reads the given q, k and v, and softmax
is in float64. Gaussian q and k have entries of standard deviation 1 (unit length) or 1/2 (half). What a number means:

    uniform             the mean of all values: with a larger error a family does less than nothing
    performer           random features of exp(q . k), by their number; a draw of its own for each sequence
    performer, relu     features of another kernel, which tends to its own limit and not to softmax
    linformer, drawn    E and F as initialised, of which training makes mixtures: where it has to start
    linformer, means    E = F, means of length / k neighbours, which need no training
    softmax of rank k   in the place of softmax's matrix the nearest one of that rank, by its singular values:
                        projections of the length to k that know q and k, and not v, can hardly do better
    longformer          a window, to each side where it sees both ways
    based               the Taylor map of q and k narrowed by the best projections for their products (singular values
                        again: trained ones do no better on the logits); its features are 1 + K + K (K + 1) / 2
    linear_attention    elu + 1
    rala                its weights of tokens and its sum, without convolution and gate, which softmax does not have

Linformer and RALA see both ways alone. TransNormer is left out: in its lower half it is softmax in blocks, longformer's
case; in its upper half no sum divides what it reads, but a norm, so that its length says nothing of softmax's.

Ranks are of a head's outputs [T, V] and of the state sum phi(k) v^T: the effective rank, exp of the entropy of the
singular values over their sum (Roy and Vetterli 2007), and how many are above 1% of the largest. RALA's claim
(arXiv:2411.07635) has two parts, which stand apart: the weights of tokens, and the product with W_g x. x is the layer's
input, or Gaussian; W_g is drawn, for a transformer has none.

    inputs      q, k, v and x
    forms       what is measured, and at which sizes
    ranks       singular values
    report      tables and a plot
"""
