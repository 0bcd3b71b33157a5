# Audits: cells as of any table, the experiments of mechanisms/, and a page of verdicts from the published records of both.


rule measure:
    output:
        touch("results/runs/mechanisms/{arm}/{batch}.measured"),
    params:
        seeds=lambda w: WORKFLOW.seeds(w.arm, w.batch),
    resources:
        dispatch="local",
        request=lambda w: WORKFLOW.request("mechanisms", w.arm, "evaluate"),
    retries: WORKFLOW.retries
    message:
        "measure {wildcards.arm}, seeds {params.seeds}"
    shell:
        "exec python -m distillbench.cluster.dispatch {resources.dispatch} {output} {resources.request:q} measure {wildcards.arm} --seeds {params.seeds}"


rule audit:
    input:
        stamps=lambda w: WORKFLOW.stamps(w.table),
        measured=lambda w: WORKFLOW.measured(w.table),
        cells="results/runs/{table}.cells",
        claims=workflows.claims_files(),
        file="workflows/tables/{table}.yaml",
        examined=[f for f in ["results/examinations.yaml"] if os.path.exists(f)],
    output:
        update("results/{table}.md"),
        update("results/{table}.csv"),
        update("results/{table}.json"),
    wildcard_constraints:
        table="|".join(WORKFLOW.experiments) or "none",
    message:
        "results/{wildcards.table}.md"
    shell:
        "exec python -m distillbench.cli table {wildcards.table} {WORKFLOW.as_profile}"
