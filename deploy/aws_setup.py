"""Make what cluster.yaml refers to on AWS, and fill in its lines marked EDIT.

python deploy/aws_setup.py --region eu-central-1 --bucket MY-BUCKET --ssh-from 203.0.113.7/32 --write my-cluster.yaml

Run it again at any time: what exists is kept, and the address that SSH is open to is replaced.
"""

import ipaddress
import json
import sys
from pathlib import Path
from typing import Any

import cyclopts

from bert_encoding.core.command_line import run_app
from bert_encoding.core.errors import InputError

TEMPLATE = Path(__file__).resolve().parents[1] / "cluster.yaml"
IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
GROUP, HEAD, WORKER = "bert-encoding", "bert-encoding-head", "bert-encoding-worker"
SPOT_ROLE = "AWSServiceRoleForEC2Spot"  # an account needs it, once, for spot instances
WIDEST_PREFIX = {4: 16, 6: 48}
# What the autoscaler on the head does; see ray/autoscaler/_private/aws/node_provider.py.
HEAD_ACTIONS = """ec2:RunInstances ec2:DescribeInstances ec2:DescribeInstanceTypes ec2:DescribeInstanceStatus
ec2:DescribeImages ec2:DescribeSubnets ec2:DescribeSecurityGroups ec2:DescribeKeyPairs ec2:DescribeVpcs
ec2:DescribeAvailabilityZones ec2:DescribeRegions""".split()
INSTANCES = "arn:aws:ec2:*:*:instance/*"
OF_RAY = {"Null": {"ec2:ResourceTag/ray-cluster-name": "false"}}  # Ray gives its machines this tag as it starts them
AS_STARTED = {"StringEquals": {"ec2:CreateAction": "RunInstances"}}

app = cyclopts.App(name="aws_setup.py", help=__doc__.split("\n\n")[0], version_flags=[])


@app.default
def main(*, region: str, bucket: str, ssh_from: str, write: Path) -> None:
    """Make security group, roles and bucket, and write a cluster file that uses them.

    Parameters
    ----------
    region
        As in eu-central-1.
    bucket
        For results; made if it does not exist, closed to the public.
    ssh_from
        The addresses that may reach the nodes by SSH, as in 203.0.113.7/32.
    write
        The cluster file to write.
    """
    check_network(ssh_from)
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        raise InputError("boto3 is missing: pip install --no-deps -r deploy/cluster.lock") from None
    try:
        session = boto3.Session(region_name=region)
        image = find_image(session.client("ssm"))
        make_bucket(session, bucket)
        make_roles(session.client("iam"), bucket)
        group = make_group(session.client("ec2"), ssh_from)
    except (BotoCoreError, ClientError) as error:
        raise InputError(f"AWS, region {region}: {error}") from None
    write.write_text(fill(TEMPLATE.read_text(), region, image, group))
    print(f"wrote {write}: image {image}, security group {group}, SSH from {ssh_from}; check it, then: ray up {write}")


def check_network(network: str) -> None:
    """Refuse to open SSH to half the world: raise InputError for a wide network, or none."""
    try:
        parsed = ipaddress.ip_network(network)
    except ValueError as error:
        raise InputError(f"--ssh-from {network}: must be a network such as 203.0.113.7/32: {error}") from None
    if parsed.prefixlen < (narrowest := WIDEST_PREFIX[parsed.version]):
        raise InputError(f"--ssh-from {network}: opens SSH to too many; at least /{narrowest}")


def find_image(ssm: Any) -> str:
    """Return the id of today's machine image of the region."""
    return str(ssm.get_parameter(Name=IMAGE)["Parameter"]["Value"])


def fill(template: str, region: str, image: str, group: str) -> str:
    """Return the cluster file with its placeholders replaced."""
    for placeholder, value in (("REGION-EDIT", region), ("ami-EDIT", image), ("sg-EDIT", group)):
        template = template.replace(placeholder, value)
    return template


def make_group(ec2: Any, ssh_from: str) -> str:
    """Return the id of a group, in the default network, that lets its members in and SSH from one network."""
    networks = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not networks:
        raise InputError("this region has no default VPC; make one: aws ec2 create-default-vpc")
    inside = [{"Name": "vpc-id", "Values": [networks[0]["VpcId"]]}, {"Name": "group-name", "Values": [GROUP]}]
    groups = ec2.describe_security_groups(Filters=inside)["SecurityGroups"]
    if not groups:
        about = "Nodes of a BERT encoding study"
        groups = [ec2.create_security_group(GroupName=GROUP, Description=about, VpcId=networks[0]["VpcId"])]
    group = groups[0]["GroupId"]
    if rules := groups[0].get("IpPermissions"):
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=rules)
    among_members = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[among_members, _ssh(ssh_from)])
    return str(group)


def _ssh(network: str) -> dict[str, Any]:
    rule: dict[str, Any] = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22}
    if ipaddress.ip_network(network).version == 6:
        return rule | {"Ipv6Ranges": [{"CidrIpv6": network}]}
    return rule | {"IpRanges": [{"CidrIp": network}]}


def make_bucket(session: Any, bucket: str) -> None:
    """Make the bucket if it does not exist, and close it to the public."""
    s3, region = session.client("s3"), session.region_name
    if bucket not in [known["Name"] for known in s3.list_buckets()["Buckets"]]:
        where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        s3.create_bucket(Bucket=bucket, **where)
        closed = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
        s3.put_public_access_block(Bucket=bucket, PublicAccessBlockConfiguration=dict.fromkeys(closed, True))


def make_roles(iam: Any, bucket: str) -> None:
    """Make the roles of head and workers: both use the bucket, the head also starts and ends Ray's machines."""
    use_bucket = [
        _allow(["s3:ListBucket", "s3:GetBucketLocation"], f"arn:aws:s3:::{bucket}"),
        _allow(
            ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"], f"arn:aws:s3:::{bucket}/*"
        ),
    ]
    worker = _make_role(iam, WORKER, use_bucket)
    start_and_end = [
        _allow(HEAD_ACTIONS, "*"),
        _allow(["ec2:TerminateInstances", "ec2:CreateTags"], INSTANCES) | {"Condition": OF_RAY},
        _allow(["ec2:CreateTags"], INSTANCES) | {"Condition": AS_STARTED},
        _allow(["iam:PassRole"], worker),
    ]
    _make_role(iam, HEAD, use_bucket + start_and_end)
    try:
        iam.get_role(RoleName=SPOT_ROLE)
    except iam.exceptions.NoSuchEntityException:
        iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")


def _make_role(iam: Any, name: str, statements: list[dict[str, Any]]) -> str:
    """Make or renew a role that machines can have, with its instance profile; return the role's ARN."""
    trust = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    try:
        arn = iam.get_role(RoleName=name)["Role"]["Arn"]
    except iam.exceptions.NoSuchEntityException:
        arn = iam.create_role(RoleName=name, AssumeRolePolicyDocument=_policy([trust]))["Role"]["Arn"]
    iam.put_role_policy(RoleName=name, PolicyName=name, PolicyDocument=_policy(statements))
    try:
        profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
    except iam.exceptions.NoSuchEntityException:
        profile = iam.create_instance_profile(InstanceProfileName=name)["InstanceProfile"]
    if not profile["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    return str(arn)


def _allow(actions: list[str], resource: str) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": actions, "Resource": resource}


def _policy(statements: list[dict[str, Any]]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


if __name__ == "__main__":
    sys.exit(run_app(app))
