# Teachers: one job per seed, since every student waits for its own.


rule teacher:
    output:
        touch("results/runs/{benchmark}/teacher/{batch}.trained"),
    params:
        seeds=lambda w: EVERY[w.benchmark, "teacher", w.batch].seeds,
    resources:
        dispatch="local",
        request=request("train"),
    retries: RETRIES
    message:
        "teacher of {wildcards.benchmark}, seed {params.seeds}"
    shell:
        "exec python -m distillbench.dispatch {resources.dispatch} {output} {resources.request:q} train {wildcards.benchmark} teacher --seeds {params.seeds}"
