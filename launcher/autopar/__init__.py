"""Planning: from a model and a cluster to a `Plan`, without any device.

make_plan(model, cluster, options)    search, or the degrees that were forced
predict(plan, model, cluster)         price any plan on any cluster
load_cluster(name)                    a packaged cluster, or a YAML file of one
auto_shard(step, *args, mesh=...)     shard any traceable function; needs nothing else of the launcher
"""

from launcher.autopar.auto_shard import ShardedFunction as ShardedFunction
from launcher.autopar.auto_shard import auto_shard as auto_shard
from launcher.autopar.cluster import load_cluster as load_cluster
from launcher.autopar.collective_costs import AlpaCosts as AlpaCosts
from launcher.autopar.collective_costs import RingCosts as RingCosts
from launcher.autopar.compute import ComputeModel as ComputeModel
from launcher.autopar.hosts import Cluster as Cluster
from launcher.autopar.intra_op_options import IntraOpOptions as IntraOpOptions
from launcher.autopar.make_plan import make_plan as make_plan
from launcher.autopar.mesh import LogicalMesh as LogicalMesh
from launcher.autopar.plan import Plan as Plan
from launcher.autopar.predict import predict as predict
from launcher.autopar.space import PlanOptions as PlanOptions
