# Audits: cells as of any table, the experiments of mechanisms/, and a page of verdicts from the published records of both.


rule measure:
    output:
        touch("results/runs/mechanisms/{arm}/{batch}.measured"),
    params:
        seeds=lambda w: ",".join(map(str, MEASURING[w.arm, w.batch].seeds)),
    resources:
        dispatch="local",
        request=lambda w: resources.request("mechanisms", w.arm, "evaluate", SITE),
    retries: RETRIES
    message:
        "measure {wildcards.arm}, seeds {params.seeds}"
    shell:
        "exec python -m distillbench.dispatch {resources.dispatch} {output} {resources.request:q} measure {wildcards.arm} --seeds {params.seeds}"


rule audit:
    input:
        stamps=lambda w: [j.stamp("evaluated") for j in JOBS[w.table]],
        measured=lambda w: [e.stamp for e in MEASURED[w.table]],
        cells="results/runs/{table}.cells",
        claims=lambda w: [f for m in registry.discover().values() if (f := m.path / "claims.yaml").is_file()],
        file="workflows/tables/{table}.yaml",
        examined=[f for f in ["results/examinations.yaml"] if os.path.exists(f)],
    output:
        update("results/{table}.md"),
        update("results/{table}.csv"),
        update("results/{table}.json"),
    wildcard_constraints:
        table="|".join(MEASURED) or "none",
    message:
        "results/{wildcards.table}.md"
    shell:
        "exec python -m distillbench.cli table {wildcards.table} {AS_PROFILE}"
